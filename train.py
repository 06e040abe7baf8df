"""Distills a teacher into a student: `python train.py --pair resnet110_resnet32`."""

import logging
import os
import shlex
import signal
import sys
from pathlib import Path

# TensorFlow greets with a dozen lines about the processor; they would bury the first error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# oneDNN's kernels took two thirds of the time of TensorFlow's own (docs/speed.md), which are the
# default on processors without AVX-512. Both are read when TensorFlow is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# It also warns of every new model that predicts.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

_BACKENDS = ("tensorflow", "jax", "torch")


def main(argv=None):
    """Runs the command and returns its exit status."""
    return run_command("train.py", sys.argv[1:] if argv is None else argv, _run)


def _run(config_of, argv, command):
    from dskd_keras import experiment
    from dskd_keras.config import ExperimentConfig

    experiment.run(config_of(ExperimentConfig), command=command)


def run_command(script, argv, run):
    """Runs one of the commands and says what went wrong in one line.

    Args:
        script: Its name.
        argv: Its arguments.
        run: Called with a function that reads a configuration of the class given, with `argv` and
            with the command line. It imports what it needs itself: Ctrl-C while the backend is
            being imported ends the command quietly.

    Returns:
        The exit status.
    """
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend not in _BACKENDS:
        return _fail(f"KERAS_BACKEND: unknown name {backend!r}. Choices: {', '.join(_BACKENDS)}.")
    try:
        from dskd_keras.command_line import parse
        from dskd_keras.errors import InputError, TrainingError
        from dskd_keras.export import ExportError
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if error.name != backend:
            raise
        return _fail(
            f"KERAS_BACKEND: {backend!r} is not installed. Install it, or set KERAS_BACKEND to "
            "another of " + ", ".join(_BACKENDS) + "."
        )
    configs = Path(__file__).parent / "configs"
    try:
        run(lambda kind: parse(kind, argv, configs, script), argv, _command_line(script, argv))
    except InputError as error:
        return _fail(error)
    except (ExportError, TrainingError) as error:
        return _fail(error, status=1)
    except KeyboardInterrupt as interrupt:
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    return 0


def _command_line(script, argv):
    """What a shell would take, the backend included."""
    backend = os.environ.get("KERAS_BACKEND")
    prefix = [f"KERAS_BACKEND={backend}"] if backend else []
    return " ".join([*prefix, shlex.join(["python", script, *argv])])


def _fail(message, status=2):
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
