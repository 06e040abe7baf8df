"""How the cost of a distillation step grows.

    python -m benchmarks.scale --pair resnet56_resnet20 --backend tensorflow

Times the DSKD step, with the folded teacher, and the student alone: against the batch size, the
number of supervised layers, of classes, the size of the images, and the depth of the student. What
is not varied is that of the pair, with 32×32 images of 100 classes.
"""

import dataclasses
from typing import Literal

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from benchmarks import timing


def main(
    pair: str = "resnet56_resnet20",
    backend: timing.Backend | None = None,
    batch_sizes: tuple[PositiveInt, ...] = (16, 64, 256),
    layers: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3),
    classes: tuple[PositiveInt, ...] = (10, 100, 1000),
    sizes: tuple[PositiveInt, ...] = (32, 64),
    students: tuple[str, ...] = ("resnet8", "resnet20", "resnet32", "resnet56"),
    rounds: PositiveInt = 3,
    steps: PositiveInt = 3,
    json_file: str | None = None,
):
    """Times distillation steps of growing size.

    Args:
        pair: A file of configs/.
        backend: tensorflow, jax or torch. Default: KERAS_BACKEND.
        batch_sizes: Images a step.
        layers: Numbers of supervised layers, the first ones of three.
        classes: Numbers of classes.
        sizes: Heights and widths of the images.
        students: Names of students.
        rounds: How often each is timed.
        steps: Steps each time.
        json_file: Where to write the results too.
    """
    timing.set_backend(backend)
    # Keras reads its backend when it is imported.
    import keras

    from benchmarks.contenders import Pair
    from dskd_keras.experiment.command_line import parse
    from dskd_keras.experiment.config import ExperimentConfig

    config = parse(ExperimentConfig, ["--pair", pair], "benchmarks.scale")
    stages = ["stage1", "stage2", "stage3"]
    points = [
        *(("batch size", value, {"batch_size": value}, {}) for value in batch_sizes),
        *(("supervised layers", value, {"student_layers": stages[:value]}, {}) for value in layers),
        *(("classes", value, {}, {"classes": value}) for value in classes),
        *(("image size", value, {}, {"size": value}) for value in sizes),
        *(("student", value, {"student": value}, {}) for value in students),
    ]
    rows, known = [], {}
    for what, value, fields, settings in points:
        kind = repr((sorted({"student": config.student, "batch_size": config.batch_size,
                             "student_layers": config.student_layers, **fields}.items()),
                     {"classes": 100, "size": 32, **settings}))  # fmt: skip
        if kind not in known:
            method = "dskd" if fields.get("student_layers", True) else "kd"
            varied = dataclasses.replace(config, method=method, **fields)
            built = Pair(varied, batches=4, **settings)
            contenders = {"DSKD": built.dskd(), "student alone": built.student_alone()}
            known[kind] = timing.in_turn(contenders, rounds, steps, lambda line: None)
        seconds = known[kind]
        batch = fields.get("batch_size", config.batch_size)
        rows.append(
            {
                "what": what,
                "value": value,
                "milliseconds": timing.milliseconds(seconds["DSKD"]),
                "milliseconds_an_image": timing.milliseconds(seconds["DSKD"]) / batch,
                "over_the_student_alone": timing.ratio(seconds, ["DSKD"], ["student alone"]),
            }
        )
        print(rows[-1], flush=True)
    result = {
        "pair": pair,
        "backend": keras.backend.backend(),
        "rounds": rounds,
        "steps": steps,
        **timing.machine(),
        "points": rows,
    }
    Console(width=120).print(_table(result))
    timing.write_json(json_file, result)


def _table(result):
    table = Table("what", title=f"DSKD, {result['pair']}, {result['backend']}")
    for column in ("value", "ms a step", "ms an image", "over the student alone"):
        table.add_column(column, justify="right")
    for row in result["points"]:
        table.add_row(
            row["what"],
            str(row["value"]),
            f"{row['milliseconds']:.0f}",
            f"{row['milliseconds_an_image']:.2f}",
            f"{row['over_the_student_alone']['median']:.2f}",
        )
    return table


if __name__ == "__main__":
    timing.run_command(main)
