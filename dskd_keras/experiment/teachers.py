"""Teachers: found, trained, kept, and measured before they teach."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from dskd_keras import files
from dskd_keras.distiller import Distiller
from dskd_keras.errors import InputError
from dskd_keras.experiment import build, evaluation, hosts, run_folder, saved_models, training
from dskd_keras.experiment.checkpoints import CheckpointFolder
from dskd_keras.experiment.run import Run
from dskd_keras.folding import fold_batch_norm
from dskd_keras.report.run_result import RunResult

# Part of a kept teacher's key: to be raised when the training of teachers changes.
_RECIPE = 2


class MeasuredTeacher(NamedTuple):
    """A teacher that may teach.

    Attributes:
        model: The model as it teaches: folded, and in its precision.
        classes: Its predictions for the N test images, int `[N]`.
        result: Its row of the table.
    """

    model: keras.Model
    classes: np.ndarray
    result: RunResult


def obtain(run: Run) -> MeasuredTeacher:
    """Loads the teacher, or trains and keeps it; measures it in any case.

    Raises:
        InputError: Its accuracy is below `min_teacher_accuracy`, its logits are not finite, or its
            file can't be used.
    """
    config = run.config
    model, path, trained = load(run)
    # What teaches is what is measured; its size and latency are those of the model as it was.
    measured = {
        "model": model.name,
        "parameters": evaluation.parameters(model),
        "latency_ms": evaluation.latency_ms(model),
        "weight_bytes": evaluation.weight_bytes(model),
    }
    model = ready_to_teach(run, model)
    logits = evaluation.predicted_logits(model, run.dataset)
    wrong = np.count_nonzero(~np.isfinite(logits).all(axis=-1))
    if wrong:
        half = config.teacher_dtype != "float32"
        raise InputError(
            f"teacher_{'dtype' if half else 'weights'}: the logits of '{path}' are not finite for "
            f"{wrong} of the {len(logits)} test images"
            + (f" in {config.teacher_dtype}. Choose float32, or bfloat16." if half else ".")
        )
    classes = np.argmax(logits, axis=-1)
    accuracy = evaluation.accuracy(classes, run.dataset)
    run.say(f"Teacher {model.name}: {100 * accuracy:.2f} % on the test set ({path})")
    chance = 1 / run.dataset.num_classes
    if accuracy < 2 * chance:
        run.say(
            f"Warning: that is hardly more than chance, {100 * chance:.2f} %. Train it longer "
            "(--teacher_epochs), and refuse such teachers (--min_teacher_accuracy)."
        )
    if accuracy < config.min_teacher_accuracy:
        raise InputError(
            f"min_teacher_accuracy: the teacher '{path}' reaches {accuracy:.4f} on the test set, "
            f"less than the {config.min_teacher_accuracy} asked for. Train it longer "
            "(--teacher_epochs), give another (--teacher_weights) or lower the bar "
            "(--min_teacher_accuracy)."
        )
    fields = {
        **trained, **measured, "method": "teacher", "dataset": run.dataset.name,
        "test_accuracy": accuracy,
    }  # fmt: skip
    return MeasuredTeacher(model, classes, RunResult(**fields))


def ready_to_teach(run: Run, model: keras.Model) -> keras.Model:
    """Returns a trained teacher as it teaches: folded and in the configured precision.

    Raises:
        InputError: A weight is too large for `teacher_dtype`, or the teacher can't be copied.
    """
    config = run.config
    if not config.fold_teacher:
        return model
    layer = config.teacher_layer
    keep = layer if isinstance(layer, list) else [] if layer in (None, "auto") else [layer]
    try:
        return fold_batch_norm(model, config.teacher_dtype, keep)
    except InputError as error:
        about_dtype = str(error).startswith("dtype")
        raise InputError(f"{'teacher_' if about_dtype else 'fold_teacher: '}{error}") from None


def load(run: Run) -> tuple[keras.Model, str, dict[str, Any]]:
    """Loads the teacher, or trains and keeps it.

    Returns:
        The model, the name of its weights, and what is known of its training: fields of
        `RunResult`.

    Raises:
        InputError: Its file can't be used.
    """
    config = run.config
    model = build.create_teacher(run)
    if (file := config.teacher_file()) is not None:
        saved_models.load_weights("teacher_weights", file, model)
        return model, str(config.teacher_weights), {}
    wanted = recipe(run)
    key = hashlib.blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=6).hexdigest()
    name = f"{wanted['model']}-{Path(run.dataset.name).stem}-{key}.keras"
    path = Path(config.teacher_dir) / name
    if not path.is_file():
        _train(run, path, wanted)
    # Also those of a process that was killed after it had saved the teacher.
    CheckpointFolder(path.with_suffix("") / "checkpoints").clear()
    saved_models.load_weights("teacher_dir", path, model)
    return model, str(path), saved_models.read_notes(path)["result"]


def recipe(run: Run) -> dict[str, Any]:
    """Returns everything that shapes a trained teacher, a dict that JSON can hold."""
    run = _training_run(run)
    fields = (
        "epochs", "batch_size", "learning_rate", "schedule", "decay_at", "decay_factor",
        "momentum", "nesterov", "weight_decay", "teacher_seed",
    )  # fmt: skip
    return {
        "recipe": _RECIPE,
        "model": run.config.teacher.casefold(),
        "num_classes": run.dataset.num_classes,
        "input_shape": build.input_shape(run.dataset),
        "training_data": run.dataset.fingerprint,
        "augmentation": training.augmentation(run),
        "backend": keras.backend.backend(),
        "dtype_policy": keras.config.dtype_policy().name,
        **{field: getattr(run.config, field) for field in fields},
    }


def _training_run(run: Run) -> Run:
    """Returns the run by which a missing teacher is trained: on the labels alone."""
    config = run.config
    return run.replace(
        method="ce",
        student=config.teacher,
        dtype_policy="float32",
        epochs=config.teacher_epochs or config.epochs,
        learning_rate=config.teacher_learning_rate or config.learning_rate,
        seeds=[config.teacher_seed],
        cached_views=0,
    )


def _untrained(run: Run) -> Distiller:
    keras.utils.set_random_seed(run.config.teacher_seed)
    return build.distiller(run, None, build.create_student(run), to_train=True)


def follow(run: Run) -> None:
    """Takes part in the training of a teacher that another process leads."""
    run = _training_run(run)
    with run.devices.scope():
        training.follow(run, _untrained(run), run.config.teacher_seed)


def _train(run: Run, path: Path, wanted: dict[str, Any]) -> None:
    """Trains the teacher and saves it, unless another process is just doing so."""
    folder = path.with_suffix("")
    waiting = f"Waiting for another process, which is training '{path.stem}'."
    files.check_writable("teacher_dir", path.parent)
    with run_folder.claimed("teacher_dir", folder, run.say, waiting):
        if path.is_file():
            return
        run.say(f"Training the teacher {run.config.teacher}", style="bold")
        if not run.config.resume:
            run_folder.set_aside(folder, run.say)
        run = _training_run(run)
        seed = run.config.teacher_seed
        try:
            with hosts.here().together(trains="teacher"), run.devices.scope():
                distiller = _untrained(run)
                trained = training.train(run, distiller, seed, folder)
        except KeyboardInterrupt:
            run.say(f"Interrupted while the teacher was trained ({folder}); --resume goes on.")
            raise
        result = {
            "images_per_second": trained.images_per_second,
            "seconds": trained.seconds,
            "epochs": run.config.epochs,
            "seed": seed,
            **evaluation.software(),
        }
        notes = {
            "recipe": wanted,
            "result": result,
            **saved_models.dataset_notes(run.dataset),
        }
        files.remove_leftovers(path.parent, path.stem)
        saved_models.save_model(run.devices.copied(distiller.student), path, notes)
