"""Layers made anew from their configuration, with the values of the layers that they stand for."""

import tempfile
from collections.abc import Callable
from typing import Any

from keras import layers

from dskd_keras.errors import InputError


def anew(layer: Any, change: Callable[[dict[str, Any]], None] = lambda config: None) -> Any:
    """Returns a new layer like one that is given, ready to be called.

    Args:
        layer: A `keras.layers.Layer`, which is not changed.
        change: Is called with the configuration of the new layer and may change its entries.

    Returns:
        A layer with weights of its own, which it has once it was called. `copy_state` sets them.

    Raises:
        InputError: The layer can't be made from its `get_config`.
    """
    try:
        config = layer.get_config()
        change(config)
        if isinstance(layer, layers.Lambda):
            copy = layers.Lambda.from_config(config, safe_mode=False)  # nothing is read from a file
            copy.function = layer.function  # a configuration loses the variables around it
            return copy
        return type(layer).from_config(config)
    except Exception as error:  # whatever a layer of the user's raises
        raise InputError(
            f"model: layer '{layer.name}' ({type(layer).__name__}) can't be made anew from its "
            "get_config, which has to hold all arguments of __init__, with **kwargs for those of "
            f"keras.Layer: {str(error).strip().partition(chr(10))[0]}"
        ) from error


def copy_state(copy: Any, layer: Any) -> None:
    """Gives a layer that was made anew, and called, the values of the one that it stands for."""
    copy.set_weights(layer.get_weights())
    if isinstance(layer, layers.Normalization):
        copy.finalize_state()  # it computes with what it takes from them
    if hasattr(layer, "save_assets"):  # a vocabulary
        with tempfile.TemporaryDirectory() as folder:
            layer.save_assets(folder)
            copy.load_assets(folder)
