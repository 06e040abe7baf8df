"""Keeps the memory of a process flat that trains one model after another."""

import contextlib
from collections.abc import Iterator

import keras

from dskd_keras.tuning.tensorflow_internals import clean_gradient_registry


@contextlib.contextmanager
def clean_session() -> Iterator[None]:
    """A context after which the models, graphs and compiled steps that were built in it are gone.

    None of them may be used later; what was there before stays.
    """
    with clean_gradient_registry():
        yield
    keras.utils.clear_session(free_memory=True)
