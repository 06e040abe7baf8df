"""Students: trained, measured, saved and exported."""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dskd_keras import csv_cells, data, export, files
from dskd_keras.distiller import Distiller
from dskd_keras.experiment import (
    build,
    cached_targets,
    evaluation,
    hosts,
    saved_models,
    teachers,
    training,
)
from dskd_keras.experiment.checkpoints import CheckpointFolder
from dskd_keras.experiment.run import Run
from dskd_keras.experiment.teachers import MeasuredTeacher
from dskd_keras.report.run_result import RunResult

# How many test images an export is checked on.
_EXPORT_IMAGES = 8


def train(run: Run, teacher: MeasuredTeacher | None, seed: int, folder: Path) -> RunResult:
    """Trains one student and writes everything of it into its folder, which is claimed.

    Raises:
        KeyboardInterrupt: Training was asked to stop; the student so far is saved.
        TrainingError: Training could not go on.
    """
    config = run.config
    run.say(f"Training the student {config.student} ({config.method}, seed {seed})", style="bold")
    alone = dataclasses.replace(config, seeds=[seed], resume=False)
    files.write_text(folder / "config.yaml", alone.to_yaml())
    # Not student.keras: that one is finished.
    so_far = folder / "student_interrupted.keras"
    student = None
    try:
        with hosts.here().together(trains="student", seed=seed), run.devices.scope():
            model = teacher and teacher.model
            hosts.here().shared([] if model is None else model.get_weights())
            distiller = _untrained(run, model, seed)
            student = distiller.student
            batches = None
            if config.cached_views and teacher is not None:
                frozen = distiller.teacher
                layer: Any = []
                if frozen is not None and frozen.feature_names:
                    layer = frozen.layer
                cached = cached_targets.obtain(run, teacher.model, config.cached_views, layer)
                batches = cached.batches(run, distiller, seed)
            trained = training.train(run, distiller, seed, folder, batches)
    except KeyboardInterrupt:
        if student is not None:
            _save_interrupted(run, student, so_far)
        raise
    except Exception:
        # Nothing to go on from: what is mended now is another configuration, free to begin here.
        if not CheckpointFolder(folder / "checkpoints").exist():
            (folder / "config.yaml").unlink(missing_ok=True)
        raise
    # What is measured and saved is a model of one device.
    student = run.devices.copied(distiller.student)
    saved_models.save_student(run, student, folder / "student.keras")
    so_far.unlink(missing_ok=True)
    classes = evaluation.predicted_classes(student, run.dataset)
    heads = evaluation.head_accuracies(distiller, run)
    accuracies = trained.history["val_accuracy"]
    best_epoch = int(np.argmax(accuracies))
    best_accuracy = accuracies[best_epoch]
    if run.dataset.x_validation is not None:
        student.set_weights(trained.best_weights)
        best_classes = evaluation.predicted_classes(student, run.dataset)
        best_accuracy = evaluation.accuracy(best_classes, run.dataset)
        saved_models.save_student(run, student, folder / "student_best.keras")
    _write_confusion(folder / "confusion.csv", classes, run.dataset)
    result = RunResult(
        method=config.method,
        model=student.name,
        dataset=run.dataset.name,
        parameters=evaluation.parameters(student),
        test_accuracy=evaluation.accuracy(classes, run.dataset),
        best_accuracy=best_accuracy,
        best_epoch=best_epoch + 1,
        best_chosen_on="test" if run.dataset.x_validation is None else "validation",
        head_accuracies=heads,
        teacher_agreement=teacher and float(np.mean(classes == teacher.classes)),
        latency_ms=evaluation.latency_ms(student),
        weight_bytes=evaluation.weight_bytes(student),
        images_per_second=trained.images_per_second,
        seconds=trained.seconds,
        epochs=config.epochs,
        seed=seed,
        teacher=teacher and dataclasses.asdict(teacher.result),
        command=run.command,
        **evaluation.software(),
    )
    files.write_text(folder / "metrics.json", result.to_json())
    return result


def _untrained(run: Run, teacher: keras.Model | None, seed: int) -> Distiller:
    # A copy draws weights before it gets its own: the same in all processes, and the student's are
    # those of a run on one device.
    keras.utils.set_random_seed(seed)
    model = None if teacher is None else run.devices.copied(teacher)
    keras.utils.set_random_seed(seed)
    return build.distiller(run, model, build.create_student(run), to_train=True)


def follow(run: Run, seed: int) -> None:
    """Takes part in the training of a student that another process leads."""
    weights = hosts.here().shared([])
    teacher = build.create_teacher(run)
    if teacher is not None:
        teacher = teachers.ready_to_teach(run, teacher)
        # NumPy's file format doesn't know bfloat16.
        own = [np.asarray(value).dtype for value in teacher.get_weights()]
        teacher.set_weights([value.view(dtype) for value, dtype in zip(weights, own, strict=True)])
    with run.devices.scope():
        training.follow(run, _untrained(run, teacher, seed), seed)


def _save_interrupted(run: Run, student: keras.Model, path: Path) -> None:
    try:
        saved_models.save_student(run, run.devices.copied(student), path)
    except Exception as error:  # on JAX there are no values before the first step is done
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        run.say(f"Interrupted. The student so far can't be saved ({reason}); --resume goes on.")
    else:
        run.say(f"Interrupted. The student so far: {path}; --resume goes on.")


def _write_confusion(path: Path, classes: np.ndarray, dataset: data.ImageDataset) -> None:
    """Writes how many test images of each class (row) were taken for each (column)."""
    counts = np.zeros((dataset.num_classes, dataset.num_classes), np.int64)
    np.add.at(counts, (dataset.y_test, classes), 1)
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    names = [csv_cells.shown(name) for name in dataset.class_names]
    writer.writerow(["true \\ predicted", *names])
    for name, row in zip(names, counts.tolist(), strict=True):
        writer.writerow([name, *row])
    files.write_text(path, table.getvalue())


def export_saved(run: Run, folder: Path) -> None:
    """Exports the saved student in the formats that are not there yet, and checks its logits.

    Raises:
        ExportError: A file could not be written, or gives other logits.
        InputError: The saved student computes in another precision than float32.
    """
    if not run.config.export:
        return
    path = folder / "student.keras"
    images = run.dataset.x_test[:_EXPORT_IMAGES]
    if saved_models.read_notes(path)["input"] == saved_models.PIXELS:
        images = images.astype("float32")
    else:
        images = data.normalize(images, run.dataset.mean, run.dataset.std)
    if keras.config.image_data_format() == "channels_first":
        images = images.transpose(0, 3, 1, 2)
    student = None
    for format in run.config.export:
        target = folder / f"student{export.SUFFIXES[format]}"
        if target.exists():
            run.say(f"Exported before: {target}")
            continue
        export.remove_leftovers(target)  # of a process that was killed: the folder is claimed
        student = student or keras.models.load_model(path, compile=False)
        _, difference = export.export(student, format, target, images)
        run.say(
            f"Exported: {target} (logits differ by at most {difference:.1e} of their standard "
            "deviation)"
        )
