"""The tables of docs/speed.md, from the results of `benchmarks.step` or of `benchmarks.scale`.

python -m benchmarks.tables benchmarks/results/resnet*.json
python -m benchmarks.tables benchmarks/results/scale*.json
"""

import argparse
import json
from pathlib import Path


def main():
    """Prints results as Markdown: those of `benchmarks.step` side by side."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="what --json_file wrote")
    try:
        results = [json.loads(file.read_text()) for file in parser.parse_args().files]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    steps = [result for result in results if "contenders" in result]
    if steps:
        _steps(steps)
    for result in results:
        if "points" in result:
            _scale(result)


def _steps(results):
    titles = [f"{r['pair']}, {r['backend']}, {r['device']}".replace("_", " → ") for r in results]

    def table(what, part, cell):
        rows = []
        for name in dict.fromkeys(name for result in results for name in result[part]):
            cells = (cell(r[part][name]) if name in r[part] else "–" for r in results)
            rows.append([name, *cells])
        _print([what, *titles], rows, words=1)

    def cost(value):
        peak = value.get("peak_memory_mib")
        return (
            f"{value['milliseconds']:.0f} ({value['images_per_second']:,.0f}"
            + ("" if peak is None else f"; {peak:,.0f}")
            + ")"
        )

    table("ms a step (images/s; peak MiB)", "contenders", cost)
    table("ratio (quartiles)", "ratios", _ratio)


def _scale(result):
    rows = [
        [row["what"], row["value"], f"{row['milliseconds_an_image']:.2f}",
         _ratio(row["over_the_student_alone"])]
        for row in result["points"]
    ]  # fmt: skip
    _print(["", "", "ms an image", "over the student alone"], rows, words=2)


def _ratio(value):
    return "{:.2f} ({:.2f}–{:.2f})".format(value["median"], *value["quartiles"])


def _print(titles, rows, words):
    lines = [titles, ["---"] * words + ["--:"] * (len(titles) - words), *rows]
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |")
    print()


if __name__ == "__main__":
    main()
