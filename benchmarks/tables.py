"""The tables of docs/speed.md, from the results of `benchmarks.step`.

python -m benchmarks.tables benchmarks/results/resnet*.json
"""

import json
import sys
from pathlib import Path


def main(files: list[str]):
    """Prints results side by side, as Markdown.

    Args:
        files: What `benchmarks.step --json_file` wrote.
    """
    results = [json.loads(Path(file).read_text()) for file in files]
    titles = [f"{r['pair']}, {r['backend']}, {r['device']}".replace("_", " → ") for r in results]

    def table(what, part, cell):
        names = dict.fromkeys(name for result in results for name in result[part])
        print(f"| {what} | " + " | ".join(titles) + " |")
        print("|---|" + "--:|" * len(titles))
        for name in names:
            cells = [cell(r[part][name]) if name in r[part] else "–" for r in results]
            print(f"| {name} | " + " | ".join(cells) + " |")
        print()

    table(
        "ms a step (images/s; peak MiB)",
        "contenders",
        lambda value: (
            f"{value['milliseconds']:.0f} ({value['images_per_second']:,.0f}"
            + (f"; {value['peak_memory_mib']:,.0f})" if "peak_memory_mib" in value else ")")
        ),
    )
    table(
        "ratio (quartiles)",
        "ratios",
        lambda value: "{:.2f} ({:.2f}–{:.2f})".format(value["median"], *value["quartiles"]),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
