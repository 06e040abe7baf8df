"""Keeps the memory of a process flat that trains one model after another."""

import contextlib
import gc

import keras


@contextlib.contextmanager
def freed_afterwards():
    """A context whose models, graphs and compiled steps are gone after it.

    Nothing that was built in it may be used later; what was there before stays.
    """
    with gradients_forgotten():
        yield
    keras.utils.clear_session(free_memory=True)
    gc.collect()


@contextlib.contextmanager
def gradients_forgotten():
    """A context whose training steps TensorFlow does not keep for ever.

    The `fit` of every Keras model leaves its graphs behind there: the optimizer sums the gradients
    over the replicas in an operation with a gradient of its own, which TensorFlow keeps in a global
    registry, and which holds the graph. With TensorFlow 2.21 a ResNet of eight layers leaves
    13 MiB. A graph is differentiated while it is made, so none needs its entry afterwards.
    """
    registry = _gradient_registry()
    before = set(registry)
    try:
        yield
    finally:
        for name in set(registry) - before:
            if name.startswith("CustomGradient-"):
                del registry[name]


def _gradient_registry():
    """Returns TensorFlow's registry, `{}` on other backends or where it can't be found."""
    if keras.backend.backend() != "tensorflow":
        return {}
    try:
        from tensorflow.python.framework import ops

        return ops.gradient_registry._registry
    except (ImportError, AttributeError):
        return {}
