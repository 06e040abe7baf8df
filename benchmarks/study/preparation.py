"""What the cells of a scale need before the first of them: images, and a trained teacher."""

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.study import cells, plan
from benchmarks.study.plan import Cell, Scale
from dskd_keras import data, files


def prepare(
    scale: Scale,
    left: Sequence[Cell],
    machine: cells.Machine,
    threads: int,
    say: Callable[[str], object],
) -> None:
    """Makes the images and the teacher that the cells need, unless they are there."""
    if scale.classes > 1 and not cells.dataset_file(scale).exists():
        say(f"Writing the images of every class whose label is a multiple of {scale.classes}.")
        _write_images(scale, machine)
    taught = any(plan.configuration(scale, cell.fields).method != "ce" for cell in left)
    if taught and scale.trains_teacher() and not scale.teacher_weights().exists():
        cell = plan.teacher_cell(scale)
        say(f"Training the teacher {scale.config['teacher']}.")
        cells.train(scale, cell, machine, threads)
        _keep_teacher(scale, cells.student_file(scale, cell))


def _write_images(scale: Scale, machine: cells.Machine) -> None:
    path = cells.dataset_file(scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = data.load(
        machine.images or scale.config["dataset"], data_dir=scale.config.get("data_dir")
    )
    content = {"class_names": np.array(whole.class_names[:: scale.classes])}
    for part in ("train", "test"):
        images, labels = getattr(whole, f"x_{part}"), getattr(whole, f"y_{part}")
        chosen = labels % scale.classes == 0
        content[f"x_{part}"] = images[chosen]
        content[f"y_{part}"] = labels[chosen] // scale.classes
    with files.written_aside(path, ".npz") as aside:
        np.savez_compressed(aside, **content)


def _keep_teacher(scale: Scale, path) -> None:
    """Keeps a trained model's weights in float16, which are what teaches everywhere."""
    import keras

    model = keras.models.load_model(path, compile=False)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float16")
    try:
        half = keras.models.clone_model(
            model, clone_function=lambda layer: type(layer).from_config(_in_half(layer))
        )
    finally:
        keras.config.set_dtype_policy(before)
    half.set_weights(model.get_weights())
    kept = scale.teacher_weights()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with files.written_aside(kept, ".weights.h5") as aside:
        half.save_weights(aside)


def _in_half(layer):
    return {**layer.get_config(), "dtype": "float16"}
