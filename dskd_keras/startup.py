"""What has to be settled before Keras and its backend are imported."""

import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dskd_keras.errors import InputError, unknown_name

BACKENDS = ("tensorflow", "jax", "torch")


def set_tensorflow_options() -> None:
    """Sets TensorFlow's options, where the user hasn't; TensorFlow reads them when it is imported.

    oneDNN's kernels took two thirds of the time of TensorFlow's own (docs/speed.md), which are the
    default on processors without AVX-512. Their bits differ, so processes whose numbers are to
    agree need the same choice.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # A dozen lines about the processor would bury the first error.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # It warns of every new model that predicts.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def import_tensorflow() -> None:
    """Imports TensorFlow without what it says on standard error about oneDNN and CUDA.

    It says it before its logging knows `TF_CPP_MIN_LOG_LEVEL`, `ABSL_MIN_LOG_LEVEL` or any other
    setting. What it says is kept from standard error, and shown if the import fails.
    """
    set_tensorflow_options()
    if "tensorflow" in sys.modules:
        return
    with _held_back_stderr():
        import tensorflow as tf

        # A machine without a GPU is told so when devices are first looked for.
        tf.config.list_physical_devices()


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[None]:
    import tempfile

    with contextlib.ExitStack() as stack:
        try:
            kept = os.dup(2)
        except OSError:  # a process without a terminal may have closed it
            yield
            return
        stack.callback(os.close, kept)
        held_back = stack.enter_context(tempfile.TemporaryFile())
        sys.stderr.flush()
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(kept, held_back.read())
            raise
        finally:
            os.dup2(kept, 2)


def check_backend() -> str:
    """Returns the name of Keras's backend, without importing it.

    Raises:
        InputError: It is unknown, or not installed; the message names those that are.
    """
    backend = os.environ.get("KERAS_BACKEND") or _configured_backend()
    if backend not in BACKENDS:
        raise unknown_name("KERAS_BACKEND", backend, BACKENDS)
    if importlib.util.find_spec(backend) is None:
        installed = [name for name in BACKENDS if importlib.util.find_spec(name) is not None]
        there = " or ".join(f"KERAS_BACKEND={name}" for name in installed)
        raise InputError(
            f"KERAS_BACKEND: {backend!r} is not installed. "
            + (f"Set {there}, or install it with: " if there else "Install it with: ")
            + f"pip install 'dskd-keras[{backend}]'"
        )
    return backend


def _configured_backend() -> str:
    """Returns the backend of Keras's own configuration file; its default is TensorFlow."""
    home = os.environ.get("KERAS_HOME") or Path("~/.keras").expanduser()
    try:
        config = json.loads(Path(home, "keras.json").read_text(encoding="utf-8"))
        return str(config.get("backend", BACKENDS[0]))
    except (OSError, ValueError, AttributeError):
        return BACKENDS[0]
