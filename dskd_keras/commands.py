"""The three commands: they read their flags, do their work, and say in one line what went wrong."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dskd_keras import startup
from dskd_keras.answering import answer
from dskd_keras.errors import missing_package

if TYPE_CHECKING:
    from dskd_keras.experiment.config import ExperimentConfig
    from dskd_keras.tuning.config import SearchConfig


def train(argv: Sequence[str] | None = None) -> int:
    """Trains a student, and the teacher if there is none: `train.py`, `dskd-train`.

    Args:
        argv: The command's arguments. Defaults to those of this process.

    Returns:
        The exit status: 0, 1 for a run that failed, 2 for a wrong input, 128 and more for a signal.
    """

    def config_class() -> type:
        from dskd_keras.experiment.config import ExperimentConfig

        return ExperimentConfig

    def work(config: "ExperimentConfig", argv: Sequence[str]) -> None:
        from dskd_keras.experiment import hosts

        endings.append(hosts.leave)
        # Before JAX is used for anything.
        hosts.join(config, startup.check_backend())
        from dskd_keras.experiment import following, pipeline

        with hosts.losses_in_one_line():
            if not hosts.here().leads:
                following.follow(config)
                return
            with hosts.here().leading():
                pipeline.run(config, command=_command_line("train", argv))

    endings: list[Callable[[int], None]] = []
    status = _run("train", config_class, argv, work)
    for end in endings:
        end(status)
    return status


def tune(argv: Sequence[str] | None = None) -> int:
    """Searches the settings of a distillation: `tune.py`, `dskd-tune`.

    Args:
        argv: The command's arguments. Defaults to those of this process.

    Returns:
        The exit status, as that of `train`.
    """

    def config_class() -> type:
        from dskd_keras.tuning.config import SearchConfig

        return SearchConfig

    def work(config: "SearchConfig", argv: Sequence[str]) -> None:
        try:
            from dskd_keras.tuning import search
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("keras_tuner", "grpc", "six"):
                raise
            raise missing_package("tune", _pip_name(error), "tune") from None
        # A module beside the package, in a clone as in an installation.
        commands = Path(__file__).parent.parent / "dskd_commands.py"
        worker = [sys.executable, str(commands), "tune", *argv]
        search.run(config, command=_command_line("tune", argv), worker_command=worker)

    return _run("tune", config_class, argv, work)


def report(argv: Sequence[str] | None = None) -> int:
    """Writes the report of run folders: `dskd-report`.

    Args:
        argv: The command's arguments. Defaults to those of this process.

    Returns:
        The exit status, as that of `train`.
    """
    from dskd_keras.report import command

    return command.main(argv, prog="dskd-report")


def _run(
    name: str,
    config_class: Callable[[], type],
    argv: Sequence[str] | None,
    work: Callable[[Any, Sequence[str]], None],
) -> int:
    """Runs `train` or `tune`. Each imports what it needs when it needs it, and may lack it."""
    argv = sys.argv[1:] if argv is None else argv

    def read_and_work() -> None:
        try:
            from dskd_keras.experiment import command_line

            kind = config_class()
        except ModuleNotFoundError as error:
            raise missing_package(name, _pip_name(error), "train") from None
        config: Any = command_line.parse(kind, argv, _program(name))
        config.check_files()
        if startup.check_backend() == "tensorflow":
            startup.import_tensorflow()
        work(config, argv)

    return answer(read_and_work)


def _program(name: str) -> str:
    """What the command is called here: by its script in a clone, by its own name elsewhere."""
    return f"{name}.py" if Path(sys.argv[0]).name == f"{name}.py" else f"dskd-{name}"


def _command_line(name: str, argv: Sequence[str]) -> str:
    """What a shell would take, the backend included."""
    backend = os.environ.get("KERAS_BACKEND")
    prefix = [f"KERAS_BACKEND={backend}"] if backend else []
    import shlex

    program = _program(name)
    start = ["python", program] if program.endswith(".py") else [program]
    return " ".join([*prefix, shlex.join([*start, *argv])])


def _pip_name(error: ModuleNotFoundError) -> str:
    """What pip calls the package of a module that is missing."""
    package = str(error.name).partition(".")[0]
    return {"yaml": "pyyaml", "grpc": "grpcio"}.get(package, package.replace("_", "-"))
