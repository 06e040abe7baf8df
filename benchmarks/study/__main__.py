"""Runs a grid of the study: `python -m benchmarks.study small-terms`.

Cells that are kept in benchmarks/results/study/ are not trained again, so that a grid goes on from
a fresh clone. A cell that was stopped goes on from its last checkpoint, on the same machine.
"""

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

from benchmarks import timing
from dskd_commands import startup


def main(
    name: str,
    at_once: PositiveInt = 2,
    threads: PositiveInt = 1,
    only: str | None = None,
    most: NonNegativeInt | None = None,
    images: str | None = None,
    on_device: bool = False,
    steps_per_execution: PositiveInt = 1,
    smoke: bool = False,
):
    """Shows what is kept of a grid, trains the rest, and writes its table, picture and JSON.

    Args:
        name: Of a grid. Without any argument the grids are listed.
        at_once: Cells side by side.
        threads: Threads of each. Two cells of one thread are faster than one after the other of
            two.
        only: Names of cells in quotes, with ; between them, to train no others.
        most: Train so many at most; 0 writes the table of what is there.
        images: An .npz file that holds the images of the scale's data set, for a machine without
            TensorFlow Datasets. Their order in it is that of the batches.
        on_device: true makes the batches on the accelerator: the same bits.
        steps_per_execution: As for train.py: the same numbers.
        smoke: true trains every cell for two steps in a temporary folder and keeps nothing: does it
            run?
    """
    # Cells side by side share an accelerator, all of which JAX would take for each, and for this.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
        startup.import_tensorflow()  # without what it says of every processor
    from benchmarks.study import cells, evidence, plan, preparation, tables
    from dskd_keras.errors import unknown_name, wrong

    # As Ctrl-C: the cells that are being trained end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = _console()
    grid = plan.read(name)
    with contextlib.ExitStack() as stack:
        if smoke:
            grid = plan.smoke(grid)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="study-"))
            plan.KEPT = cells.WORK = Path(folder)
        chosen = grid.all_cells()
        if only is not None:
            wanted = [part.strip() for part in only.split(";")]
            for part in wanted:
                if part not in grid.cells:
                    raise unknown_name("only", part, grid.cells)
            chosen = [cell for cell in chosen if cell.name in wanted]
        if images is not None and not Path(images).is_file():
            raise wrong("images", images, "a file")
        missing = [cell for cell in chosen if not cells.is_kept(grid.scale, cell)]
        left = missing[:most]
        failed = []
        if left:
            if rows := evidence.rows(grid):
                console.print(tables.table(grid, rows))
            console.print(
                f"{len(chosen) - len(missing)} of {len(chosen)} cells are kept, {len(left)} are to "
                "be trained. (--most 0 trains none.)"
            )
            machine = cells.Machine(images, on_device, int(steps_per_execution))
            preparation.prepare(grid.scale, left, machine, at_once * threads, console.print)
            failed = cells.run(grid.scale, left, machine, at_once, threads, console.print)
        rows = evidence.rows(grid)
        console.print(tables.table(grid, rows))
        for path in tables.write(grid, rows) if rows and not smoke else []:
            console.print(f"Written: {path}")
        for cell, reason in failed:
            console.print(f"\n{cell.name}, seed {cell.seed}, failed:\n{reason}", markup=False)
        if failed:
            sys.exit(1)


def list_grids():
    """Shows what every grid asks, and how much of it is kept."""
    from benchmarks.study import plan, tables

    _console().print(tables.list_of_grids([plan.read(name) for name in plan.names()]))


def _console():
    return Console(width=140, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    timing.run_command(main if sys.argv[1:] else list_grids)
