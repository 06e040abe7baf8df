"""From a configuration to a trained student and its report: the only place that wires the parts."""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from dskd_keras import (
    artifacts,
    checkpoints,
    data,
    evaluation,
    export,
    models,
    report,
    run_folder,
    training,
    weighting,
)
from dskd_keras.distiller import Distiller
from dskd_keras.errors import InputError, unknown_name
from dskd_keras.folding import fold_batch_norm

# The methods differ in settings of the same distiller alone.
_METHODS = {
    "dskd": {},
    "kd": {"student_layers": ()},
    "ce": {"student_layers": (), "prediction_weight": 0.0, "label_weight": 1.0},
}

# Part of a cached teacher's key: to be raised when the training of teachers changes.
_TEACHER_RECIPE = 2

# How many test images an export is checked on.
_EXPORT_IMAGES = 8

# What a saved student takes that has the normalisation inside.
_PIXELS = "pixels from 0 to 255"


class Teacher(NamedTuple):
    """A teacher ready to teach; `classes` are its predictions for the test images, `[N]`."""

    model: keras.Model
    classes: np.ndarray
    result: report.RunResult


def run(config, console=None, command=None):
    """Trains (or loads) the teacher and trains the student once for each seed.

    Args:
        config: An `ExperimentConfig`.
        console: A `rich.console.Console` for messages and the table. Defaults to standard output.
        command: The command line that asked for it, to be kept with the results. Optional.

    Returns:
        A list of `report.RunResult`: the teacher's, if there is one, then the students'.

    Raises:
        InputError: Before any training, if the configuration or the data can't be used.
        KeyboardInterrupt: Training was stopped; `resume` goes on.
        TrainingError: Training or writing could not go on.
    """
    console = console or report.console()
    check_names(config)
    for format in config.export:
        export.check_available(format)
    folders = {seed: config.folder() / config.method / f"seed-{seed}" for seed in config.seeds}
    # A finished run needs no teacher any more.
    needed = not all((folder / "metrics.json").exists() for folder in folders.values())
    if config.teacher_weights and needed and not Path(config.teacher_weights).is_file():
        raise InputError(f"teacher_weights: there is no file '{config.teacher_weights}'.")
    dataset = load_data(config, console)
    # Builds everything once: what doesn't fit is said before a teacher trains for hours.
    _distiller(config, create_teacher(config, dataset), create_student(config, dataset))
    finished = {
        seed: result
        for seed, folder in folders.items()
        if (result := run_folder.finished_result(config, folder)) is not None
    }
    artifacts.check_writable("run_dir", config.folder() / config.method)

    teacher, students = None, []
    with contextlib.ExitStack() as claims:
        claims.enter_context(artifacts.disk_errors_in_one_line(config.folder()))
        for seed, folder in folders.items():
            if seed not in finished:
                claims.enter_context(run_folder.claimed("run_dir", folder))
                _set_aside(config, folder, console)
                # What can't be resumed is said before a teacher trains for it.
                training.checkpoint_to_resume(config, dataset, folder, console)
        if config.method != "ce" and len(finished) < len(folders):
            teacher = obtain_teacher(config, dataset, console)
        for seed, folder in folders.items():
            if seed in finished:
                console.print(f"Seed {seed} was finished before: {folder}")
                students.append(finished[seed])
            else:
                students.append(
                    _train_student(config, dataset, teacher, seed, folder, command, console)
                )
            checkpoints.CheckpointFolder(folder / "checkpoints").clear()
            _export(config, dataset, folder, console)
    of_teacher = teacher and teacher.result
    if of_teacher is None and students[0].teacher is not None:
        of_teacher = report.RunResult.from_dict(students[0].teacher)
    results = students if of_teacher is None else [of_teacher, *students]
    console.print(report.results_table(f"{dataset.name}, {config.method}", results))
    for folder in folders.values():
        console.print(f"Student: {folder / 'student.keras'}")
    console.print(f"Report: {report.write([config.folder()])}")
    return results


def check_names(config):
    """Raises `InputError` unless the configured models are in the zoo."""
    for field in ("teacher", "student"):
        name = getattr(config, field)
        if name.casefold() not in (known.casefold() for known in models.names()):
            raise unknown_name(field, name, models.names())


def load_data(config, console):
    """Loads the configured `data.ImageDataset` and says what it is."""
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        train_examples=config.train_examples,
        validation_fraction=config.validation_fraction,
    )
    console.print(_describe(dataset))
    return dataset


def _describe(dataset):
    parts = [f"{len(dataset.x_train):,} training"]
    if dataset.x_validation is not None:
        parts.append(f"{len(dataset.x_validation):,} validation")
    parts.append(f"{len(dataset.x_test):,} test images")
    height, width, channels = dataset.input_shape
    text = f"{dataset.name}: {', '.join(parts)} of {height}×{width}×{channels}, "
    return text + "; ".join([f"{dataset.num_classes} classes", *dataset.notes])


def _input_shape(dataset):
    height, width, channels = dataset.input_shape
    if keras.config.image_data_format() == "channels_first":
        return channels, height, width
    return height, width, channels


def create_student(config, dataset):
    """Returns a new student for the data set, in the configured precision."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.dtype_policy)
    try:
        return models.create(
            config.student, dataset.num_classes, _input_shape(dataset), field="student"
        )
    finally:
        keras.config.set_dtype_policy(before)


def create_teacher(config, dataset):
    """Returns the teacher's architecture for the data set; None where the method needs none."""
    if config.method == "ce":
        return None
    return models.create(
        config.teacher, dataset.num_classes, _input_shape(dataset), field="teacher"
    )


def ready_to_teach(config, teacher):
    """Returns a trained teacher folded and in the configured precision; None where there is none.

    Raises:
        InputError: A weight is too large for `teacher_dtype`, or the teacher can't be copied.
    """
    if teacher is None or not config.fold_teacher:
        return teacher
    keep = [] if config.teacher_layer is None else [config.teacher_layer]
    try:
        return fold_batch_norm(teacher, config.teacher_dtype, keep)
    except InputError as error:
        about_dtype = str(error).startswith("dtype")
        raise InputError(f"{'teacher_' if about_dtype else 'fold_teacher: '}{error}") from None


def distiller_settings(config):
    """Returns the arguments of `Distiller`, beside the two models, that a configuration holds."""
    allocation = weighting.get(config.weighting)
    if isinstance(allocation, weighting.Softmax):
        allocation = weighting.Softmax(config.weighting_temperature)
    return {
        "student_layers": config.student_layers,
        "teacher_layer": config.teacher_layer,
        "temperature": config.temperature,
        "label_weight": config.label_weight,
        "prediction_weight": config.prediction_weight,
        "deep_prediction_weight": config.deep_prediction_weight,
        "deep_feature_weight": config.deep_feature_weight,
        "weighting": allocation,
        **_METHODS[config.method],
    }


def _distiller(config, teacher, student):
    return Distiller(teacher, student, **distiller_settings(config))


def _teacher_config(config):
    """The configuration by which a missing teacher is trained: on the labels alone."""
    return dataclasses.replace(
        config,
        method="ce",
        student=config.teacher,
        dtype_policy="float32",
        epochs=config.teacher_epochs or config.epochs,
        learning_rate=config.teacher_learning_rate or config.learning_rate,
        seeds=[config.teacher_seed],
    )


def _teacher_recipe(config, dataset):
    """Everything that shapes a trained teacher, as a dict that JSON can hold."""
    config = _teacher_config(config)
    fields = (
        "epochs", "batch_size", "learning_rate", "schedule", "decay_at", "decay_factor",
        "momentum", "nesterov", "weight_decay", "teacher_seed",
    )  # fmt: skip
    return {
        "recipe": _TEACHER_RECIPE,
        "model": config.teacher.casefold(),
        "num_classes": dataset.num_classes,
        "input_shape": _input_shape(dataset),
        "training_data": dataset.fingerprint(),
        "augmentation": training.augmentation(config, dataset),
        "backend": keras.backend.backend(),
        "dtype_policy": keras.config.dtype_policy().name,
        **{field: getattr(config, field) for field in fields},
    }


def load_teacher(config, dataset, console):
    """Loads the teacher, or trains and caches it.

    Returns:
        `(model, path, notes)`: the model, its file, and what is known of its training, a dict of
        `report.RunResult` fields.

    Raises:
        InputError: Its file can't be used.
    """
    recipe = _teacher_recipe(config, dataset)
    key = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=6).hexdigest()
    cached = Path(config.teacher_dir) / f"{recipe['model']}-{Path(dataset.name).stem}-{key}.keras"
    model = create_teacher(config, dataset)
    if config.teacher_weights is not None:
        path = Path(config.teacher_weights)
        artifacts.load_weights("teacher_weights", path, model)
        return model, path, {}
    if not cached.is_file():
        _train_teacher(config, dataset, cached, recipe, console)
    # Also those of a process that was killed after it had saved the teacher.
    checkpoints.CheckpointFolder(cached.with_suffix("") / "checkpoints").clear()
    artifacts.load_weights("teacher_dir", cached, model)
    return model, cached, artifacts.read_notes(cached)["result"]


def obtain_teacher(config, dataset, console):
    """Loads the teacher, or trains and caches it; evaluates it in any case.

    Returns:
        `Teacher`.

    Raises:
        InputError: Its accuracy is below `min_teacher_accuracy`, its logits are not finite, or its
            file can't be used.
    """
    model, path, result = load_teacher(config, dataset, console)
    # What teaches is what is evaluated; its size and latency are those of the model as it was.
    parameters, name = _parameters(model), model.name
    latency_ms, weight_bytes = evaluation.latency_ms(model), evaluation.weight_bytes(model)
    model = ready_to_teach(config, model)
    logits = evaluation.predicted_logits(model, dataset)
    wrong = np.count_nonzero(~np.isfinite(logits).all(axis=-1))
    if wrong:
        half = config.teacher_dtype != "float32"
        raise InputError(
            f"teacher_{'dtype' if half else 'weights'}: the logits of '{path}' are not finite for "
            f"{wrong} of the {len(logits)} test images"
            + (f" in {config.teacher_dtype}. Choose float32, or bfloat16." if half else ".")
        )
    classes = np.argmax(logits, axis=-1)
    accuracy = evaluation.accuracy(classes, dataset)
    console.print(f"Teacher {name}: {100 * accuracy:.2f} % on the test set ({path})")
    if accuracy < config.min_teacher_accuracy:
        raise InputError(
            f"min_teacher_accuracy: the teacher '{path}' reaches {accuracy:.4f} on the test set, "
            f"less than the {config.min_teacher_accuracy} asked for. Train it longer "
            "(--teacher_epochs), give another (--teacher_weights) or lower the bar."
        )
    result = report.RunResult(
        **{
            **result,
            "method": "teacher",
            "model": name,
            "dataset": dataset.name,
            "parameters": parameters,
            "test_accuracy": accuracy,
            "latency_ms": latency_ms,
            "weight_bytes": weight_bytes,
        }
    )
    return Teacher(model, classes, result)


def _train_teacher(config, dataset, cached, recipe, console):
    """Trains the teacher and saves it as `cached`, unless another process is just doing so."""

    def waiting():
        console.print(f"Waiting for another process, which is training '{cached.stem}'.")

    folder = cached.with_suffix("")
    artifacts.check_writable("teacher_dir", cached.parent)
    with run_folder.claimed("teacher_dir", folder, waiting):
        if cached.is_file():
            return
        console.print(f"Training the teacher {config.teacher}", style="bold")
        _set_aside(config, folder, console)
        config = _teacher_config(config)
        keras.utils.set_random_seed(config.teacher_seed)
        distiller = _distiller(config, None, create_student(config, dataset))
        try:
            trained = training.train(
                config, distiller, dataset, config.teacher_seed, folder, console
            )
        except KeyboardInterrupt:
            console.print(
                f"Interrupted while the teacher was trained ({folder}); --resume goes on."
            )
            raise
        result = {
            "images_per_second": trained.images_per_second,
            "seconds": trained.seconds,
            "epochs": config.epochs,
            "seed": config.teacher_seed,
            **_environment(),
        }
        notes = {"recipe": recipe, "result": result, **_dataset_notes(dataset)}
        artifacts.remove_leftovers(cached.parent, cached.stem)
        artifacts.save_model(distiller.student, cached, notes)


def _train_student(config, dataset, teacher, seed, folder, command, console):
    """Trains one student and writes everything of it into `folder`."""
    console.print(f"Training the student {config.student} ({config.method}, seed {seed})",
                  style="bold")  # fmt: skip
    artifacts.write_text(
        folder / "config.yaml", dataclasses.replace(config, seeds=[seed], resume=False).to_yaml()
    )
    keras.utils.set_random_seed(seed)
    student = create_student(config, dataset)
    distiller = _distiller(config, teacher and teacher.model, student)
    # Not student.keras: that one is finished.
    so_far = folder / "student_interrupted.keras"
    try:
        trained = training.train(config, distiller, dataset, seed, folder, console)
    except KeyboardInterrupt:
        # Before the first step is done a student has nothing to keep, and on JAX no values at all.
        with contextlib.suppress(Exception):
            _save_student(config, student, dataset, so_far)
            console.print(f"Interrupted. The student so far: {so_far}; --resume goes on.")
        raise
    _save_student(config, student, dataset, folder / "student.keras")
    so_far.unlink(missing_ok=True)
    classes = evaluation.predicted_classes(student, dataset)
    heads = evaluation.head_accuracies(distiller, dataset)
    accuracies = trained.history["val_accuracy"]
    best_epoch = int(np.argmax(accuracies))
    best_accuracy = accuracies[best_epoch]
    if dataset.x_validation is not None:
        student.set_weights(trained.best_weights)
        best_accuracy = evaluation.accuracy(evaluation.predicted_classes(student, dataset), dataset)
        _save_student(config, student, dataset, folder / "student_best.keras")
    _write_confusion(folder / "confusion.csv", evaluation.confusion(classes, dataset), dataset)
    result = report.RunResult(
        method=config.method,
        model=student.name,
        dataset=dataset.name,
        parameters=_parameters(student),
        test_accuracy=evaluation.accuracy(classes, dataset),
        best_accuracy=best_accuracy,
        best_epoch=best_epoch + 1,
        best_chosen_on="test" if dataset.x_validation is None else "validation",
        head_accuracies=heads,
        teacher_agreement=teacher and float(np.mean(classes == teacher.classes)),
        latency_ms=evaluation.latency_ms(student),
        weight_bytes=evaluation.weight_bytes(student),
        images_per_second=trained.images_per_second,
        seconds=trained.seconds,
        epochs=config.epochs,
        seed=seed,
        teacher=teacher and dataclasses.asdict(teacher.result),
        command=command,
        **_environment(),
    )
    artifacts.write_text(
        folder / "metrics.json", json.dumps(dataclasses.asdict(result), indent=1) + "\n"
    )
    return result


def _set_aside(config, folder, console):
    if not config.resume and (aside := run_folder.set_aside(folder)) is not None:
        console.print(f"An interrupted run was set aside: {aside} (--resume would have gone on).")


def _export(config, dataset, folder, console):
    """Exports the saved student in the formats that are not there yet, and checks its logits."""
    if not config.export:
        return
    path = folder / "student.keras"
    images = dataset.x_test[:_EXPORT_IMAGES]
    if artifacts.read_notes(path)["input"] == _PIXELS:
        images = images.astype("float32")
    else:
        images = data.normalize(images, dataset.mean, dataset.std)
    if keras.config.image_data_format() == "channels_first":
        images = images.transpose(0, 3, 1, 2)
    student = None
    for format in config.export:
        target = folder / f"student{export.SUFFIXES[format]}"
        if target.exists():
            console.print(f"Exported before: {target}")
            continue
        student = student or keras.models.load_model(path, compile=False)
        _, difference = export.export(student, format, target, images)
        console.print(f"Exported: {target} (logits differ by at most {difference:.1e} of their "
                      "standard deviation)")  # fmt: skip


def _write_confusion(path, counts, dataset):
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["true \\ predicted", *dataset.class_names])
    for name, row in zip(dataset.class_names, counts.tolist(), strict=True):
        writer.writerow([name, *row])
    artifacts.write_text(path, table.getvalue())


def _save_student(config, student, dataset, path):
    notes = _dataset_notes(dataset)
    if config.include_preprocessing:
        inputs = keras.Input(student.inputs[0].shape[1:], name="pixels")
        normalization = keras.layers.Normalization(
            axis=1 if keras.config.image_data_format() == "channels_first" else -1,
            mean=[255 * value for value in dataset.mean],
            variance=[(255 * value) ** 2 for value in dataset.std],
            name="normalization",
        )
        student = keras.Model(inputs, student(normalization(inputs)), name=student.name)
        notes["input"] = _PIXELS
    artifacts.save_model(student, path, notes)


def _dataset_notes(dataset):
    """What a user of a saved model needs to know of the images that it was trained on."""
    return {
        "dataset": dataset.name,
        "class_names": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "input": "(pixels / 255 - mean) / std, by channel",
    }


def _parameters(model):
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def _environment():
    names = ("keras", "tensorflow", "jax", "torch", "numpy")
    versions = {}
    for name in names:
        if name in ("keras", "numpy", keras.backend.backend()):
            versions[name] = importlib.metadata.version(name)
    return {"backend": keras.backend.backend(), "versions": versions}
