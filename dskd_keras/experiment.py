"""From a configuration to a trained student and its report: the only place that wires the parts."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import keras
import numpy as np
import yaml
from rich.console import Console

from dskd_keras import artifacts, data, models, report, weighting
from dskd_keras.callbacks import Throughput
from dskd_keras.distiller import Distiller
from dskd_keras.errors import InputError, unknown_name
from dskd_keras.optimizers import SGD

# The methods differ in settings of the same distiller alone.
_METHODS = {
    "dskd": {},
    "kd": {"student_layers": ()},
    "ce": {"student_layers": (), "prediction_weight": 0.0, "label_weight": 1.0},
}

# Fields that say where things are and which runs to make; the rest shapes the numbers of a run.
_PLACES = ("pair", "data_dir", "run_dir", "teacher_dir", "seeds")

# Part of a cached teacher's key: to be raised when the training of teachers changes.
_TEACHER_RECIPE = 2

_EVALUATION_BATCH = 256


def run(config, console=None):
    """Trains (or loads) the teacher and trains the student once for each seed.

    Args:
        config: An `ExperimentConfig`.
        console: A `rich.console.Console` for messages and the table. Defaults to standard output.

    Returns:
        A list of `report.RunResult`: the teacher's, if there is one, then the students'.

    Raises:
        InputError: Before any training, if the configuration or the data can't be used.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    _check_names(config)
    folders = {seed: config.folder() / config.method / f"seed-{seed}" for seed in config.seeds}
    # A finished run needs no teacher any more.
    needed = not all((folder / "metrics.json").exists() for folder in folders.values())
    if config.teacher_weights and needed and not Path(config.teacher_weights).is_file():
        raise InputError(f"teacher_weights: there is no file '{config.teacher_weights}'.")
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        train_examples=config.train_examples,
        validation_fraction=config.validation_fraction,
    )
    console.print(_describe(dataset))
    # Builds everything once: what doesn't fit is said before a teacher trains for hours.
    _distiller(config, _teacher_architecture(config, dataset), _student(config, dataset))
    finished = {
        seed: result
        for seed, folder in folders.items()
        if (result := _finished_result(config, folder)) is not None
    }
    artifacts.check_writable("run_dir", config.folder() / config.method)

    teacher, of_teacher, students = None, None, []
    if config.method != "ce" and len(finished) < len(folders):
        teacher, of_teacher = _obtain_teacher(config, dataset, console)
    for seed, folder in folders.items():
        if seed in finished:
            console.print(f"Seed {seed} was finished before: {folder}")
            students.append(finished[seed])
        else:
            students.append(
                _train_student(config, dataset, teacher, of_teacher, seed, folder, console)
            )
    if of_teacher is None and students[0].teacher is not None:
        of_teacher = report.RunResult(**students[0].teacher)
    results = students if of_teacher is None else [of_teacher, *students]
    console.print(report.results_table(f"{dataset.name}, {config.method}", results))
    for folder in folders.values():
        console.print(f"Student: {folder / 'student.keras'}")
    return results


def _check_names(config):
    for field in ("teacher", "student"):
        name = getattr(config, field)
        if name.casefold() not in (known.casefold() for known in models.names()):
            raise unknown_name(field, name, models.names())


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


def _student(config, dataset):
    return models.create(
        config.student, dataset.num_classes, _input_shape(dataset), field="student"
    )


def _teacher_architecture(config, dataset):
    if config.method == "ce":
        return None
    return models.create(
        config.teacher, dataset.num_classes, _input_shape(dataset), field="teacher"
    )


def _distiller(config, teacher, student):
    allocation = weighting.get(config.weighting)
    if isinstance(allocation, weighting.Softmax):
        allocation = weighting.Softmax(config.weighting_temperature)
    settings = {
        "student_layers": config.student_layers,
        "label_weight": config.label_weight,
        "prediction_weight": config.prediction_weight,
        **_METHODS[config.method],
    }
    return Distiller(
        teacher,
        student,
        teacher_layer=config.teacher_layer,
        temperature=config.temperature,
        deep_prediction_weight=config.deep_prediction_weight,
        deep_feature_weight=config.deep_feature_weight,
        weighting=allocation,
        **settings,
    )


def _fit(config, distiller, dataset, seed, callbacks=()):
    """Trains a distiller by the configuration's protocol.

    Returns:
        `(history, images_per_second)`.
    """
    batches = data.TrainingBatches(
        dataset.x_train,
        dataset.y_train,
        config.batch_size,
        seed,
        dataset.mean,
        dataset.std,
        augmentation=_augmentation(config, dataset),
    )
    steps = batches.steps_per_epoch
    held_out = "test" if dataset.x_validation is None else "validation"
    throughput = Throughput(len(dataset.x_train), steps)
    distiller.compile(
        optimizer=SGD(
            _learning_rate(config, steps * config.epochs),
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        ),
        **_compile_options(),
    )
    history = distiller.fit(
        batches,
        steps_per_epoch=steps,
        epochs=config.epochs,
        shuffle=False,
        validation_data=_evaluation_batches(dataset, held_out),
        callbacks=[throughput, *callbacks],
        # The moving bar needs a terminal; a log gets one line an epoch.
        verbose=1 if sys.stdout.isatty() else 2,
    )
    return history.history, throughput.images_per_second


def _compile_options():
    return {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": [keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    }


def _learning_rate(config, steps):
    """The schedule over all steps of a training run.

    The places of the drops are shares of the training, so that a short run goes through the same
    schedule: 0.625, 0.75 and 0.875 are the 150th, 180th and 210th of 240 epochs.
    """
    if config.schedule == "cosine":
        return keras.optimizers.schedules.CosineDecay(config.learning_rate, decay_steps=steps)
    drops = sorted(config.decay_at)
    if not drops:
        return config.learning_rate
    # A boundary is the last step with the old rate.
    return keras.optimizers.schedules.PiecewiseConstantDecay(
        [round(share * steps) - 1 for share in drops],
        [config.learning_rate * config.decay_factor**k for k in range(len(drops) + 1)],
    )


def _augmentation(config, dataset):
    return dataset.augmentation if config.augmentation == "auto" else config.augmentation


def _evaluation_batches(dataset, part):
    return data.EvaluationBatches(
        getattr(dataset, f"x_{part}"),
        getattr(dataset, f"y_{part}"),
        _EVALUATION_BATCH,
        dataset.mean,
        dataset.std,
    )


def _test_accuracy(model, dataset):
    if not model.compiled:
        model.compile(**_compile_options())
    results = model.evaluate(_evaluation_batches(dataset, "test"), verbose=0, return_dict=True)
    return float(results["accuracy"])


def _teacher_config(config):
    """The configuration by which a missing teacher is trained: on the labels alone."""
    return dataclasses.replace(
        config,
        method="ce",
        student=config.teacher,
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
        "augmentation": _augmentation(config, dataset),
        "backend": keras.backend.backend(),
        "dtype_policy": keras.config.dtype_policy().name,
        **{field: getattr(config, field) for field in fields},
    }


def _obtain_teacher(config, dataset, console):
    """Loads the teacher, or trains and caches it; evaluates it in any case.

    Returns:
        `(model, report.RunResult)`.

    Raises:
        InputError: Its accuracy is below `min_teacher_accuracy`, or its file can't be used.
    """
    recipe = _teacher_recipe(config, dataset)
    key = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=6).hexdigest()
    cached = Path(config.teacher_dir) / f"{recipe['model']}-{Path(dataset.name).stem}-{key}.keras"
    result = {}
    teacher = _teacher_architecture(config, dataset)
    if config.teacher_weights is not None:
        path = Path(config.teacher_weights)
        artifacts.load_weights("teacher_weights", path, teacher)
    elif cached.is_file():
        path = cached
        artifacts.load_weights("teacher_dir", path, teacher)
        result = artifacts.read_notes(path)["result"]
    else:
        path = cached
        artifacts.check_writable("teacher_dir", cached.parent)
        console.print(f"Training the teacher {config.teacher}", style="bold")
        try:
            teacher, result = _train_teacher(config, dataset)
        except KeyboardInterrupt:
            console.print("Interrupted. The teacher was not finished and is not kept.")
            raise
        notes = {"recipe": recipe, "result": result, **_dataset_notes(dataset)}
        artifacts.save_model(teacher, cached, notes)
    parameters = _parameters(teacher)
    accuracy = _test_accuracy(teacher, dataset)
    console.print(f"Teacher {teacher.name}: {100 * accuracy:.2f} % on the test set ({path})")
    if accuracy < config.min_teacher_accuracy:
        raise InputError(
            f"min_teacher_accuracy: the teacher '{path}' reaches {accuracy:.4f} on the test set, "
            f"less than the {config.min_teacher_accuracy} asked for. Train it longer "
            "(--teacher_epochs), give another (--teacher_weights) or lower the bar."
        )
    return teacher, report.RunResult(
        **{
            **result,
            "method": "teacher",
            "model": teacher.name,
            "parameters": parameters,
            "test_accuracy": accuracy,
        }
    )


def _train_teacher(config, dataset):
    config = _teacher_config(config)
    start = time.perf_counter()
    keras.utils.set_random_seed(config.teacher_seed)
    distiller = _distiller(config, None, _student(config, dataset))
    _, images_per_second = _fit(config, distiller, dataset, config.teacher_seed)
    result = {
        "images_per_second": images_per_second,
        "seconds": time.perf_counter() - start,
        "epochs": config.epochs,
        "seed": config.teacher_seed,
        **_environment(),
    }
    return distiller.student, result


def _train_student(config, dataset, teacher, of_teacher, seed, folder, console):
    """Trains one student and writes everything of it into `folder`."""
    start = time.perf_counter()
    artifacts.check_writable("run_dir", folder)
    console.print(f"Training the student {config.student} ({config.method}, seed {seed})",
                  style="bold")  # fmt: skip
    artifacts.write_text(
        folder / "config.yaml", dataclasses.replace(config, seeds=[seed]).to_yaml()
    )
    keras.utils.set_random_seed(seed)
    student = _student(config, dataset)
    distiller = _distiller(config, teacher, student)
    best_weights = folder / "best.weights.h5"
    callbacks = [keras.callbacks.CSVLogger(folder / "history.csv")]
    if dataset.x_validation is not None:
        callbacks.append(
            keras.callbacks.ModelCheckpoint(
                best_weights,
                monitor="val_accuracy",
                mode="max",
                save_best_only=True,
                save_weights_only=True,
            )
        )
    try:
        history, images_per_second = _fit(config, distiller, dataset, seed, callbacks)
    except KeyboardInterrupt:
        # Before the first step is done a student has nothing to keep, and on JAX no values at all.
        with contextlib.suppress(Exception):
            _save_student(config, student, dataset, folder / "student.keras")
            console.print(f"Interrupted. The student so far: {folder / 'student.keras'}")
        raise
    _save_student(config, student, dataset, folder / "student.keras")
    best_epoch = int(np.argmax(history["val_accuracy"]))
    accuracy = best_accuracy = float(history["val_accuracy"][-1])
    if dataset.x_validation is None:
        best_accuracy = float(history["val_accuracy"][best_epoch])
    else:
        accuracy = _test_accuracy(distiller, dataset)
        distiller.load_weights(best_weights)
        best_accuracy = _test_accuracy(distiller, dataset)
        _save_student(config, student, dataset, folder / "student_best.keras")
        best_weights.unlink()
    result = report.RunResult(
        method=config.method,
        model=student.name,
        parameters=_parameters(student),
        test_accuracy=accuracy,
        best_accuracy=best_accuracy,
        best_epoch=best_epoch + 1,
        best_chosen_on="test" if dataset.x_validation is None else "validation",
        images_per_second=images_per_second,
        seconds=time.perf_counter() - start,
        epochs=config.epochs,
        seed=seed,
        teacher=None if of_teacher is None else dataclasses.asdict(of_teacher),
        **_environment(),
    )
    artifacts.write_text(
        folder / "metrics.json", json.dumps(dataclasses.asdict(result), indent=1) + "\n"
    )
    return result


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
        notes["input"] = "pixels from 0 to 255"
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


def _finished_result(config, folder):
    """Returns the result of a finished run of the same configuration, None where there is none.

    Raises:
        InputError: The folder holds a run of another configuration.
    """
    try:
        known = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"run_dir: can't read '{folder}': {error.strerror}.") from None
    except yaml.YAMLError:
        known = None
    if not isinstance(known, dict):
        raise InputError(f"run_dir: '{folder}/config.yaml' is damaged. Choose another --run_dir.")
    wanted = dataclasses.asdict(config)
    differences = [
        f"{field}: {known.get(field)!r} there, {wanted[field]!r} here"
        for field in wanted
        if field not in _PLACES and known.get(field) != wanted[field]
    ]
    if differences:
        raise InputError(
            f"run_dir: '{folder}' holds a run of another configuration "
            f"({'; '.join(differences)}). Choose another --run_dir."
        )
    metrics = folder / "metrics.json"
    if not metrics.exists():
        _set_aside(folder)
        return None
    return report.RunResult(**json.loads(metrics.read_text(encoding="utf-8")))


def _set_aside(folder):
    """Renames the folder of an interrupted run, so that starting again loses nothing."""
    attempt = 1
    while (aside := folder.with_name(f"{folder.name}.unfinished-{attempt}")).exists():
        attempt += 1
    folder.rename(aside)
