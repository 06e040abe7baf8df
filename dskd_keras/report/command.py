"""The command that writes the report of run folders."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dskd_keras import checks
from dskd_keras.answering import answer
from dskd_keras.errors import InputError, missing_package

# Packages that pip knows by another name than Python.
_PIP_NAMES = {"yaml": "pyyaml"}


def main(argv: Sequence[str] | None = None, prog: str = "python -m dskd_keras.report") -> int:
    """Writes the report of run folders and prints their tables.

    Args:
        argv: The command's arguments. Defaults to those of this process.
        prog: What the command is called.

    Returns:
        The exit status: 0, 2 for a wrong input, 130 for an interrupt.
    """
    parser = _Parser(
        prog=prog, description="Writes pictures and an HTML page from the files of run folders."
    )
    parser.add_argument(
        "run_dir", nargs="+", metavar="RUN_DIR",
        help="a run folder, such as runs/PAIR; several are shown side by side",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FILE",
        help="the HTML file (default: report.html in RUN_DIR, or here for several)",
    )  # fmt: skip

    def work() -> None:
        arguments = parser.parse_args(argv)
        try:
            _report(arguments.run_dir, arguments.output)
        except ModuleNotFoundError as error:
            name = str(error.name).partition(".")[0]
            raise missing_package("report", _PIP_NAMES.get(name, name), "train") from None

    return answer(work)


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See {self.prog} --help.")


def _report(run_dirs: Sequence[str], output: str | None) -> None:
    for field, path in [*(("run_dir", run_dir) for run_dir in run_dirs), ("output", output)]:
        if path is not None:
            checks.path(field, path)
    # Here, where what is missing of their packages is said in one line.
    from dskd_keras.report import page, reading, table

    runs = reading.read_runs(run_dirs)
    written = page.write_runs(runs, output)
    console = table.console()
    for run in runs:
        if run.results:
            title = f"{run.name}: {run.seeds[0].dataset}"
            console.print(table.results_table(title, [*run.teachers(), *run.results]))
        for seed in run.seeds:
            if seed.result is None:
                accuracy = "" if seed.accuracy is None else f", {100 * seed.accuracy:.2f} % so far"
                console.print(f"{run.name}/{seed.method}/seed-{seed.seed}: {seed.state}{accuracy}")
            for problem in seed.problems:
                console.print(problem)
    console.print(f"Report: {written}")
