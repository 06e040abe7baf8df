"""From a configuration to its data set, its models and its distiller."""

from typing import Any

import keras
from rich.console import Console

from dskd_keras import data, graph, models, weighting
from dskd_keras.distiller import Distiller
from dskd_keras.errors import InputError
from dskd_keras.experiment import device_images
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.run import Run
from dskd_keras.models import catalog, zoo

# The methods differ in settings of the same distiller alone.
_METHODS: dict[str, dict[str, Any]] = {
    "dskd": {},
    "kd": {"student_layers": ()},
    "ce": {"student_layers": (), "prediction_weight": 0.0, "label_weight": 1.0},
}


def load_data(config: ExperimentConfig, console: Console) -> data.ImageDataset:
    """Loads the configured data set and says what it is."""
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        train_examples=config.train_examples,
        validation_fraction=config.validation_fraction,
        stream=config.stream,
        stream_workers=config.stream_workers,
    )
    for field in ("student",) if config.method == "ce" else ("teacher", "student"):
        _check_size(dataset, config.image_size, getattr(config, field))
    console.print(_described(dataset))
    return dataset


def _check_size(dataset: data.ImageDataset, image_size: int | None, model: str) -> None:
    """Raises `InputError` where images are too small for a model."""
    name = catalog.check_name("model", model)
    least, (height, width, _) = zoo.family(name).MINIMUM_SIZE, dataset.input_shape
    if min(height, width) < least:
        seen = "the images are" if image_size is None else "resized to it the images are"
        raise InputError(
            f"image_size: {image_size}, but {seen} {height}×{width}, and {name} needs "
            f"{least}×{least}. Take --image_size {least} or more."
        )


def _described(dataset: data.ImageDataset) -> str:
    parts = [f"{len(dataset.x_train):,} training"]
    if dataset.x_validation is not None:
        parts.append(f"{len(dataset.x_validation):,} validation")
    parts.append(f"{len(dataset.x_test):,} test images")
    height, width, channels = dataset.input_shape
    text = f"{dataset.name}: {', '.join(parts)} of {height}×{width}×{channels}, "
    return text + "; ".join([f"{dataset.num_classes} classes", *dataset.notes])


def input_shape(dataset: data.ImageDataset) -> tuple[int, int, int]:
    """Returns the shape of an image in the order of Keras's image data format."""
    height, width, channels = dataset.input_shape
    if keras.config.image_data_format() == "channels_first":
        return channels, height, width
    return height, width, channels


def create_student(run: Run) -> keras.Model:
    """Returns a new student, in the configured precision."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(run.config.dtype_policy)
    try:
        return _create("student", run)
    finally:
        keras.config.set_dtype_policy(before)


def create_teacher(run: Run) -> keras.Model | None:
    """Returns the teacher with random weights; None where the method needs none."""
    return None if run.config.method == "ce" else _create("teacher", run)


def _create(field: str, run: Run) -> keras.Model:
    name = getattr(run.config, field)
    return models.create(name, run.dataset.num_classes, input_shape(run.dataset), field=field)


def distiller_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the arguments of `Distiller`, beside the two models, that a configuration holds."""
    strategy = weighting.get(config.weighting)
    if isinstance(strategy, weighting.Softmax):
        strategy = weighting.Softmax(config.weighting_temperature)
    return {
        "student_layers": config.student_layers,
        "teacher_layer": config.teacher_layer,
        "temperature": config.temperature,
        "label_weight": config.label_weight,
        "prediction_weight": config.prediction_weight,
        "deep_prediction_weight": config.deep_prediction_weight,
        "deep_feature_weight": config.deep_feature_weight,
        "prediction_loss": config.prediction_loss,
        "feature_loss": config.feature_loss,
        "head": config.head,
        "weighting": strategy,
        **_METHODS[config.method],
    }


def teacher_layers(config: ExperimentConfig, teacher: keras.Model) -> list[str] | str | None:
    """Returns what `FrozenTeacher` takes to have all maps that any student layers may need."""
    if config.method != "dskd":
        return []
    if config.teacher_layer != "auto":
        return config.teacher_layer
    found = graph.auto_teacher_layers(teacher)
    return found if len(found) > 1 else None


def distiller(
    run: Run, teacher: keras.Model | None, student: keras.Model, to_train: bool = False
) -> Distiller:
    """Returns the configured distiller of two models.

    Args:
        run: The configuration and its images.
        teacher: None where the method needs none.
        student: A new one.
        to_train: With the training images, where they are to lie on the device.
    """
    settings = distiller_settings(run.config)
    if to_train and run.config.augment_on == "device":
        images = device_images.DeviceImages(run.dataset)
        return device_images.DeviceDistiller(teacher, student, images=images, **settings)
    return Distiller(teacher, student, **settings)
