"""The one place that reaches for what TensorFlow keeps private.

`tests/test_keras_tuner_internals.py` says so where a new version has taken it away.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras


@contextlib.contextmanager
def clean_gradient_registry() -> Iterator[None]:
    """A context whose training steps TensorFlow does not keep for ever.

    The `fit` of every Keras model leaves its graphs behind: the optimizer sums the gradients over
    the replicas in an operation with a gradient of its own. TensorFlow keeps that one in a global
    registry, and it holds the graph. With TensorFlow 2.21 a ResNet of eight layers leaves 13 MiB.
    A graph is differentiated while it is made, so none needs its entry afterwards. On other
    backends the context does nothing.
    """
    registry = gradient_registry() if keras.backend.backend() == "tensorflow" else {}
    before = set(registry)
    try:
        yield
    finally:
        for name in set(registry) - before:
            if name.startswith("CustomGradient-"):
                del registry[name]


def gradient_registry() -> dict[str, Any]:
    """Returns the functions that differentiate TensorFlow's operations, by name; may be changed."""
    from tensorflow.python.framework import ops

    return ops.gradient_registry._registry
