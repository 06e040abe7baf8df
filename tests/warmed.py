"""The commands in forks of one process that has imported all of them: most of a short run is that.

`python tests/warmed.py` reads a request a line and answers it a line, both JSON. A fork ends as the
command would in a process of its own; one that takes too long is killed, and its status is None.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = (
    "train", "tune", "benchmarks.step", "dskd_keras.experiment.pipeline",
    "dskd_keras.tuning.search", "dskd_keras.report.page", "dskd_keras.report.curves",
    "dskd_keras.report.confusion", "dskd_keras.report.layers", "sklearn.model_selection",
    "PIL.Image", "PIL.PngImagePlugin", "keras.src.saving", "benchmarks.contenders",
)  # fmt: skip


class Warmed:
    """The process, to be asked; a context."""

    def __enter__(self):
        of_forks = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # they can't use a GPU
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **of_forks}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(10)

    def run(self, folder, command, argv, output="stdout", seconds=10):
        """Runs a command in a folder.

        Args:
            folder: Where, and where `stderr` is written.
            command: "train", "tune", "report" or "step".
            argv: Its arguments.
            output: The file that its standard output is, "closed", or "pipe" for a pipe that
                nobody reads.
            seconds: When it is killed.

        Returns:
            Its exit status, None if it was killed, and its standard error.
        """
        request = {"folder": str(folder), "command": command, "argv": list(argv),
                   "output": output, "seconds": seconds}  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        return status, (Path(folder).parent / "stderr").read_text(errors="backslashreplace")


def _redirect(request):
    os.chdir(request["folder"])
    errors = os.open("../stderr", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(errors, 2)
    if request["output"] == "closed":
        os.close(1)
        sys.stdout = sys.__stdout__ = None
        return
    if request["output"] == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        path = Path("..", request["output"])
        writer = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(writer, 1)


def _run(request):
    """What the interpreter does with a command; returns the exit status."""
    name, argv = request["command"], request["argv"]
    status = 0
    try:
        if name == "step":
            from benchmarks import step, timing

            sys.argv = ["benchmarks/step.py", *argv]
            timing.run_command(step.main)
        else:
            import dskd_commands

            sys.argv = [f"{name}.py", *argv]
            status = getattr(dskd_commands, name)(argv)
    except SystemExit as stop:
        status = stop.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        print("Exception ignored: the last flush failed", file=sys.stderr)
        status = 120
    sys.stderr.flush()
    return status


def _answer(request):
    process = os.fork()
    if not process:
        status = 99
        try:
            _redirect(request)
            status = _run(request)
        finally:
            os._exit(status)
    end = time.monotonic() + request["seconds"]
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def main():
    # What the forks print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    for module in MODULES:
        importlib.import_module(module)
    import keras
    import numpy as np

    from dskd_keras import Distiller, models
    from dskd_keras.experiment import command_line, config
    from dskd_keras.report import confusion, reading

    # What is imported when it is first needed.
    teacher, student = (models.create("resnet8", 3, (8, 8, 3)) for _ in range(2))
    Distiller(teacher, student, ["stage1"])
    keras.models.clone_model(student)  # imports TensorFlow, where there is one
    confusion.picture(reading.Confusion(("a", "b"), np.eye(2, dtype="int64")))
    command_line.parse(config.ExperimentConfig, ["--pair", "resnet20_resnet8"], "train.py")
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
