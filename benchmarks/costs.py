"""What a distillation on ImageNet costs, on paper: `python -m benchmarks.costs`.

Three terms are measured here, each as seconds an image: the forward pass of the folded teacher, the
training step of the student with its auxiliary heads, and the decoding of a JPEG by one process.
Everything else follows from them, from the sizes of the models, and from what is assumed of the
accelerators, which are flags.

An accelerator is taken to be faster than this processor by the same factor for teacher and student.
It is the factor between `--tflops` and what this processor reaches with the teacher.
"""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console
from rich.table import Table

from benchmarks import timing

# ImageNet's training images: their number and their mean size in bytes.
_IMAGES, _JPEG_BYTES = 1_281_167, 112_000
# Floating-point operations of ResNet-50 for an image of 224×224, two for each multiplication with
# its addition. He et al., "Deep residual learning" (2016), table 1, counts those as one.
_TEACHER_FLOP = 2 * 3.8e9
_TOP = 10


class Terms(NamedTuple):
    """What is measured, in seconds an image, and sizes in bytes."""

    teacher: float
    student: float
    decoding: float
    gradients: int
    feature_map: int


def main(
    batch_size: PositiveInt = 16,
    rounds: PositiveInt = 3,
    steps: PositiveInt = 3,
    epochs: PositiveInt = 90,
    views: PositiveInt = 90,
    tflops: PositiveFloat = 60.0,
    batch_a_device: PositiveInt = 128,
    gigabits: PositiveFloat = 25.0,
    backend: timing.Backend | None = "tensorflow",
    json_file: str | None = None,
):
    """Measures the terms, and prints what follows.

    Args:
        batch_size: Images a step, here.
        rounds: How often each term is timed.
        steps: Steps each time.
        epochs: Of the training.
        views: Different views of each image that a teacher would be shown beforehand.
        tflops: What an accelerator reaches with the teacher: 60 is a fifth of the 312 that an A100
            is sold with.
        batch_a_device: Images a step on each accelerator.
        gigabits: A second, of a host's network.
        backend: tensorflow, jax or torch. Default: KERAS_BACKEND.
        json_file: Where to write the results too.
    """
    timing.set_backend(backend)
    console = Console(width=100)
    terms = _measure(batch_size, rounds, steps, console)
    factor = tflops * 1e12 * terms.teacher / _TEACHER_FLOP
    console.print(
        f"here, ms an image: teacher {1e3 * terms.teacher:.1f}, student's step "
        f"{1e3 * terms.student:.1f}, decoding {1e3 * terms.decoding:.1f}; the teacher is "
        f"{terms.teacher / (terms.teacher + terms.student):.0%} of the step; an accelerator is "
        f"{factor:,.0f} times as fast"
    )
    result = {"machine": timing.machine(), "terms": terms._asdict(), "rows": []}
    table = Table(title=f"{epochs} epochs of ImageNet", title_justify="left")
    names = (
        "accelerators", "hosts", "images/s", "hours", "hours without teacher", "cores that decode",
        "GB/s of JPEGs", "gradients, % of the step",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for hosts, devices in ((1, 8), (64, 512)):
        row = project(terms, factor, hosts, devices, epochs, batch_a_device, gigabits)
        result["rows"].append(row)
        table.add_row(
            f"{devices}",
            f"{hosts}",
            f"{row['images_per_second']:,.0f}",
            f"{row['hours']:.2f}",
            f"{row['hours_without_teacher']:.2f}",
            f"{row['decoding_cores_a_host']:.0f} a host",
            f"{row['jpeg_bytes_a_second_and_host'] / 1e9:.1f} a host",
            f"{100 * row['gradient_share']:.0f}",
        )
    console.print(table)
    stored = _IMAGES * views
    result["stored"] = {
        f"top {_TOP} logits": stored * _TOP * (2 + 2),
        "feature map": stored * terms.feature_map,
    }
    for what, size in result["stored"].items():
        console.print(f"{what} of {views} views of all images: {size / 1e9:,.1f} GB")
    timing.write_json(json_file, result)


def project(terms, factor, hosts, devices, epochs, batch, gigabits):
    """Returns what so many accelerators would take.

    Computing and reading go on side by side; gradients are exchanged after the step, by a ring.
    """
    step = batch * (terms.teacher + terms.student) / factor
    # A ring sends and takes each gradient nearly twice. Within one host it costs next to nothing.
    exchange = 2 * terms.gradients * 8 / (gigabits * 1e9) if hosts > 1 else 0.0
    speed = devices * batch / (step + exchange)
    alone = devices * batch / (batch * terms.student / factor + exchange)
    return {
        "devices": devices,
        "hosts": hosts,
        "images_per_second": speed,
        "hours": epochs * _IMAGES / speed / 3600,
        "hours_without_teacher": epochs * _IMAGES / alone / 3600,
        "decoding_cores_a_host": speed / hosts * terms.decoding,
        "jpeg_bytes_a_second_and_host": speed / hosts * _JPEG_BYTES,
        "gradient_share": exchange / (step + exchange),
    }


def _measure(batch_size, rounds, steps, console):
    import keras

    import dskd_keras
    from benchmarks.stream import make_folder
    from dskd_keras import data

    teacher = dskd_keras.fold_batch_norm(
        keras.applications.ResNet50(weights=None, classifier_activation=None)
    )
    student = keras.applications.MobileNetV2(weights=None, classifier_activation=None)
    parameters = sum(int(np.prod(weight.shape)) for weight in student.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Its own shape of a feature map, from a distiller that also checks that the two fit.
    with_heads = dskd_keras.Distiller(teacher, student, "auto")
    map_shape = with_heads.teacher.feature_shape
    with_heads.compile(keras.optimizers.SGD(0.01), loss)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch_size, 224, 224, 3)).astype("float32")
    y = rng.integers(0, 1000, batch_size)

    def distill(steps):
        return _seconds(lambda: with_heads.train_on_batch(x, y), steps)

    def teach(steps):
        return _seconds(lambda: teacher.predict_on_batch(x), steps)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images")
        make_folder(path, 200)
        dataset = data.load(path, image_size=224, stream=True, stream_workers=0)
        batches = data.TrainingBatches(
            dataset.x_train, dataset.y_train, batch_size, 0, dataset.mean, dataset.std,
            "resized_crop_flip",
        )  # fmt: skip

        def decode(steps):
            return _seconds(lambda: batches.plan(0), steps)

        contenders = {"teacher": teach, "distillation": distill, "decoding": decode}
        seconds = timing.in_turn(contenders, rounds, steps, console.print)
    found = {name: timing.milliseconds(values) / 1e3 for name, values in seconds.items()}
    return Terms(
        found["teacher"] / batch_size,
        (found["distillation"] - found["teacher"]) / batch_size,
        found["decoding"] / batch_size,
        4 * parameters,
        2 * int(np.prod(map_shape)),
    )


def _seconds(work, steps):
    begin = time.perf_counter()
    for _ in range(steps):
        work()
    return (time.perf_counter() - begin) / steps


if __name__ == "__main__":
    timing.run_command(main)
