"""Writes the report of run folders: `python -m dskd_keras.report RUN_DIR… [--output FILE]`."""

import argparse
import sys

from dskd_keras.errors import InputError
from dskd_keras.report import page
from dskd_keras.report.results import console as new_console
from dskd_keras.report.results import results_table


def main(argv=None):
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dskd_keras.report",
        description="Writes pictures and an HTML page from the files of run folders.",
    )
    parser.add_argument(
        "run_dir",
        nargs="+",
        metavar="RUN_DIR",
        help="a run folder, such as runs/PAIR; several are shown side by side",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the HTML file (default: report.html in RUN_DIR, or here for several)",
    )
    arguments = parser.parse_args(argv)
    try:
        runs = page.read(arguments.run_dir)
        output = page.write_runs(runs, arguments.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    console = new_console()
    for run in runs:
        students = [seed.result for seed in run.seeds if seed.result is not None]
        if students:
            title = f"{run.name}: {run.seeds[0].dataset}"
            console.print(results_table(title, [*run.teachers(), *students]))
        for seed in run.seeds:
            if seed.result is None:
                accuracy = "" if seed.accuracy is None else f", {100 * seed.accuracy:.2f} % so far"
                console.print(f"{run.name}/{seed.method}/seed-{seed.seed}: {seed.state}{accuracy}")
            for problem in seed.problems:
                console.print(problem)
    console.print(f"Report: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
