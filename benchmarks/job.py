"""A whole distillation, from the command to the saved student, and where its seconds go.

    python -m benchmarks.job --backend tensorflow

The same small job from a cold start, in turn: `train.py`, and RepDistiller's way of working in one
plain PyTorch script, with its DataLoader and a file for the best student. Teacher, student, images,
batches, epochs and the evaluation after each are the same. The images are random; of five for
training there is one for the test, as in CIFAR-100.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from benchmarks import timing

# Paid in every epoch, and once.
_EACH = ("steps", "evaluation", "files")
PARTS = ("start-up", "data", "models", "compiling", *_EACH, "measuring", "report", "other")
# Seconds of the job for which it is said what would not be steps.
_LONG = 600.0


def main(
    backend: timing.Backend | None = None,
    teacher: str = "resnet56",
    student: str = "resnet20",
    images: PositiveInt = 4000,
    test_images: PositiveInt = 800,
    epochs: PositiveInt = 3,
    rounds: PositiveInt = 3,
    peers: bool = True,
    json_file: str | None = None,
):
    """Times the whole job, part by part.

    Args:
        backend: Of train.py. Default: KERAS_BACKEND.
        teacher: A residual network of the zoo.
        student: A smaller one.
        images: For training, of 100 classes.
        test_images: Evaluated after every epoch.
        epochs: Of the student.
        rounds: How often each job is done.
        peers: Also time the PyTorch script.
        json_file: Where to write the results too.
    """
    timing.set_backend(backend)
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder), teacher, images, test_images)
        arguments = [folder, teacher, student, str(epochs)]
        jobs = {"train.py": "benchmarks.job_of_ours"}
        jobs |= {"PyTorch script": "benchmarks.job_of_pytorch"} if peers else {}
        found = {name: [] for name in jobs}
        for round in range(rounds):
            for name, module in jobs.items():
                found[name].append(_timed(module, arguments))
                total = sum(found[name][-1].values())
                console.print(f"round {round + 1} of {rounds}: {name} {total:.1f} s")
    _show(console, found)
    if json_file is not None:
        results = {**timing.machine(), "backend": backend, "teacher": teacher, "student": student}
        results |= {"images": images, "test_images": test_images, "epochs": epochs}
        Path(json_file).write_text(json.dumps(results | {"seconds": found}, indent=1) + "\n")


def _prepare(folder, teacher, images, test_images):
    """Writes the images, and the weights of a teacher that knows nothing."""
    from dskd_keras import models

    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", images), ("test", test_images)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, 32, 32, 3), "uint8")
        arrays[f"y_{part}"] = (np.arange(count) % 100).astype("uint8")
    np.savez(folder / "images.npz", **arrays)
    models.create(teacher, 100, (32, 32, 3)).save_weights(folder / "teacher.weights.h5")


def _timed(module, arguments):
    """Runs a job in a process of its own; returns its seconds by part."""
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-m", module, str(start), *arguments], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    total = time.time() - start
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr[-2000:]}")
    seconds = json.loads(done.stdout.strip().splitlines()[-1])
    # The rest is what no part claims, the end of the process included.
    return {**seconds, "other": total - sum(seconds.values())}


def _show(console, found):
    table = Table(title="seconds, medians over the rounds")
    table.add_column("part")
    for name in found:
        table.add_column(name, justify="right")
    medians = {
        name: {part: float(np.median([run.get(part, 0.0) for run in runs])) for part in PARTS}
        for name, runs in found.items()
    }
    for part in PARTS:
        table.add_row(part, *(f"{seconds[part]:.1f}" for seconds in medians.values()))
    table.add_row("all", *(f"{sum(seconds.values()):.1f}" for seconds in medians.values()))
    console.print(table)
    for name, seconds in medians.items():
        each = sum(seconds[part] for part in _EACH)
        once = sum(seconds.values()) - each
        share = (once + (_LONG - once) * (1 - seconds["steps"] / each)) / _LONG
        console.print(f"{name}: of a job of ten minutes {100 * share:.1f} % would not be steps.")
    if len(medians) == 2:
        ours, peer = (np.array([sum(run.values()) for run in runs]) for runs in found.values())
        low, median, high = np.quantile(peer / ours, [0.25, 0.5, 0.75])
        console.print(f"PyTorch script / train.py: {median:.2f} ({low:.2f}–{high:.2f})")


if __name__ == "__main__":
    timing.run_command(main)
