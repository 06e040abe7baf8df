"""All that needs an accelerator, by one command: `python -m benchmarks.accelerator`.

For each backend: the tests, `benchmarks.step`, and short distillations with the batches from the
host and from the device. What came of each lies as a log in `runs/accelerator/`, and as a table in
`benchmarks/results/accelerator.md` and `.json`. One that fails leaves the others to go on.

    python -m benchmarks.accelerator --smoke true        # the same on a processor, in minutes
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from benchmarks import timing

_ROOT = Path(__file__).parent.parent
_RUNS = Path("runs", "accelerator")
# Where batches are made, and how many steps run together: each divides 782, the steps of an epoch
# of CIFAR-100 in batches of 64.
_DEVICE = ("--augment_on", "device")
_TRAININGS = {"host": (), "device": _DEVICE, "device, 23 steps together": (
    *_DEVICE, "--steps_per_execution", "23")}  # fmt: skip


def main(
    backends: list[Literal["jax", "torch", "tensorflow"]] | None = None,
    pair: str = "resnet56_resnet20",
    dataset: str = "cifar100",
    epochs: int = 3,
    tests: bool = True,
    smoke: bool = False,
    results: str = "benchmarks/results/accelerator",
):
    """Runs everything, and writes the tables.

    Args:
        backends: A list such as [jax]. Default: [jax, torch].
        pair: A file of configs/.
        dataset: For the short distillations.
        epochs: Of the teacher and of the student in each of them.
        tests: Also run the tests.
        smoke: Small models, small images, one test file: whether the commands work.
        results: The table's files, without .md and .json.
    """
    small = ()
    if smoke:
        pair, dataset, epochs, small = "resnet20_resnet8", "digits", 1, ("--image_size", "8")
    console, rows = Console(width=110), []
    for backend in backends or ["jax", "torch"]:
        for name, command, metrics in _work(backend, pair, dataset, epochs, tests, smoke, small):
            row = _run(console, backend, name, command)
            if metrics is not None and metrics.is_file():
                kept = json.loads(metrics.read_text())
                row |= {key: kept[key] for key in ("images_per_second", "test_accuracy")}
            rows.append(row)
            _write(rows, Path(results))
    console.print(f"{results}.md", highlight=False)
    if any(row["status"] for row in rows):
        sys.exit(1)


def _work(backend, pair, dataset, epochs, tests, smoke, small):
    """Yields what is run: a name, its arguments for Python, and the metrics that it leaves."""
    if tests:
        files = ["tests/test_weighting.py"] if smoke else ["tests"]
        side_by_side = [] if smoke else ["-n", str(max(1, len(os.sched_getaffinity(0)) - 1))]
        yield "tests", ["-m", "pytest", "-q", *side_by_side, *files], None
    few = ["--steps", "20"]  # a step takes milliseconds there
    if smoke:
        few = ["--rounds", "1", "--steps", "1", "--memory", "false"]
    kept = ["--json_file", f"benchmarks/results/{pair}-{backend}-accelerator.json"]
    kept = [] if smoke else kept
    yield "step", ["-m", "benchmarks.step", "--pair", pair, "--backend", backend, *few, *kept], None
    for name, flags in _TRAININGS.items():
        if "together" in name and backend == "torch":
            continue  # Keras runs single steps there
        folder = _RUNS / f"{backend}-{name.replace(', ', '-').replace(' ', '-')}"
        shutil.rmtree(_ROOT / folder, ignore_errors=True)
        training = [
            "train.py", "--pair", pair, "--dataset", dataset, "--epochs", str(epochs),
            "--teacher_epochs", str(epochs), "--batch_size", "64", "--run_dir", str(folder),
            "--teacher_dir", str(_RUNS / f"{backend}-teachers"), *flags, *small,
        ]  # fmt: skip
        yield f"train, {name}", training, _ROOT / folder / "dskd" / "seed-0" / "metrics.json"


def _run(console, backend, name, command):
    """Runs Python with arguments, its output in a log; returns what is to be written of it."""
    log = _ROOT / _RUNS / f"{backend}-{name.replace(', ', '-').replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # JAX would take the whole accelerator for each process of the tests.
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if name == "tests":  # they compare with NumPy, in full single precision
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    start = time.perf_counter()
    with open(log, "w") as file:
        status = subprocess.run(
            [sys.executable, *command], cwd=_ROOT, env=environment, stdout=file, stderr=file,
            check=False,
        ).returncode  # fmt: skip
    seconds = time.perf_counter() - start
    lines = log.read_text(errors="replace").split("\n")
    # What pytest counts, or what went wrong.
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    console.print(
        f"{backend}: {name}: {'done' if status == 0 else f'status {status}'} after {seconds:.0f} s"
        + (f" ({escape(last[:150])}; {log.relative_to(_ROOT)})" if status else ""),
        highlight=False,
    )
    return {
        "backend": backend, "what": name, "status": status, "seconds": round(seconds, 1),
        "command": " ".join(["python", *command]), "last_line": last[:200] if status else "",
    }  # fmt: skip


def _write(rows, results):
    results = _ROOT / results
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| backend | what | status | seconds | images/s | test accuracy, % |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        rate, accuracy = row.get("images_per_second"), row.get("test_accuracy")
        lines.append(
            f"| {row['backend']} | {row['what']} | {row['status']} | {row['seconds']:.0f} | "
            f"{'–' if rate is None else f'{rate:,.0f}'} | "
            f"{'–' if accuracy is None else f'{100 * accuracy:.2f}'} |"
        )
    results.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    timing.run_command(main)
