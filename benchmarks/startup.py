"""How long an answer and an import take: `python -m benchmarks.startup`.

An answer (help, a mistake) is compared with `import jsonargparse, yaml`, which every command needs;
`import dskd_keras` with `import keras`. Each is a process of its own.
"""

import functools
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import timing

_ROOT = Path(__file__).parent.parent
_PARSER = "import jsonargparse, yaml"
_PAIR = ["--pair", "resnet20_resnet8"]
_ANSWERS = {
    "train.py --help": ["train.py", "--help"],
    "tune.py --help": ["tune.py", "--help"],
    "train.py --print_config": ["train.py", *_PAIR, "--print_config"],
    "a mistyped pair": ["train.py", "--pair", "resnet20_resnet9"],
    "a mistyped flag": ["train.py", *_PAIR, "--epoch", "3"],
    "a mistyped value": ["train.py", *_PAIR, "--epochs", "many"],
    "a mistyped model": ["train.py", *_PAIR, "--student", "resnet9"],
    "a mistyped file": ["train.py", *_PAIR, "--dataset", "nothing.npz"],
}


def main(rounds: int = 20, imports: bool = True):
    """Measures answers and imports.

    Args:
        rounds: How often each is timed, in turn with the others.
        imports: Whether to time the imports of Keras, too, which take seconds.
    """
    commands = {_PARSER: ["-c", _PARSER], **_ANSWERS}
    tables = [("answers", _PARSER, commands, rounds)]
    if imports:
        both = {f"import {name}": ["-c", f"import {name}"] for name in ("keras", "dskd_keras")}
        tables.append(("imports", "import keras", both, max(rounds // 4, 3)))
    console = Console(width=100)
    for title, base, commands, times in tables:
        contenders = {
            name: functools.partial(_seconds, arguments) for name, arguments in commands.items()
        }
        seconds = timing.in_turn(contenders, times, 1, lambda line: None)
        table = Table(title=title, title_justify="left")
        for column in ("command", "ms", f"of {base}", "quartiles"):
            table.add_column(column, justify="left" if column == "command" else "right")
        for name, values in seconds.items():
            ratio = timing.ratio(seconds, [name], [base])
            low, high = ratio["quartiles"]
            table.add_row(
                name, f"{timing.milliseconds(values):.0f}", f"{ratio['median']:.2f}",
                f"{low:.2f} to {high:.2f}",
            )  # fmt: skip
        console.print(table)
    console.print(timing.machine())


def _seconds(arguments, _):
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=_ROOT, capture_output=True, check=False)
    return time.perf_counter() - begin


if __name__ == "__main__":
    timing.run_command(main)
