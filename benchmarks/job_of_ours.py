"""`train.py` on the job of `benchmarks.job`, with a clock on its parts.

python -m benchmarks.job_of_ours START FOLDER TEACHER STUDENT EPOCHS
"""

import contextlib
import functools
import json
import statistics
import sys
import time

import dskd_commands

# Parts, innermost last, each with the moment at which its clock went on.
_running = []
_seconds = {}
_steps, _evaluations = [], []
# What these are called where they are done once, after the epochs.
_ONCE = {"evaluation": "measuring", "files": "report"}


def _go_on(part):
    now = time.perf_counter()
    if _running:
        outer, since = _running[-1]
        _seconds[outer] = _seconds.get(outer, 0.0) + now - since
    _running.append((part, now))


def _end():
    part, since = _running.pop()
    now = time.perf_counter()
    _seconds[part] = _seconds.get(part, 0.0) + now - since
    if _running:
        _running[-1] = (_running[-1][0], now)


def _timed(owner, name, part):
    """Has a function's time counted as a part's; what it calls of another part is not."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def timed(*args, **kwargs):
        in_epochs = any(outer == "steps" for outer, _ in _running)
        _go_on(part if in_epochs else _ONCE.get(part, part))
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            _end()
            if in_epochs and part == "evaluation":
                _evaluations.append(time.perf_counter() - start)

    setattr(owner, name, timed)


def _watch():
    """Puts clocks on the package, once it is imported."""
    import keras

    from dskd_keras import files, report
    from dskd_keras.distiller import Distiller
    from dskd_keras.experiment import (
        build,
        checkpoints,
        evaluation,
        saved_models,
        students,
        teachers,
        training,
    )

    _timed(build, "load_data", "data")
    for owner, names in (
        (build, ("create_student", "create_teacher", "distiller")),
        (teachers, ("load", "ready_to_teach")),
        (Distiller, ("compile",)),
    ):
        for name in names:
            _timed(owner, name, "models")
    for name in ("predicted_logits", "predicted_classes", "head_accuracies", "latency_ms"):
        _timed(evaluation, name, "evaluation")
    _timed(Distiller, "evaluate", "evaluation")
    _timed(checkpoints.Checkpointer, "_save", "files")
    _timed(saved_models, "save_student", "files")
    _timed(files, "write_text", "files")
    _timed(report, "write", "files")
    _timed(students, "_write_confusion", "files")
    _timed(training, "_fit", "steps")
    fit = Distiller.fit

    def with_clock(self, *args, callbacks, **kwargs):
        clock = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: _steps.append(-time.perf_counter()),
            on_train_batch_end=lambda batch, logs: _steps.append(
                _steps.pop() + time.perf_counter()
            ),
        )
        return fit(self, *args, callbacks=[clock, *callbacks], **kwargs)

    Distiller.fit = with_clock


def main(start, folder, teacher, student, epochs):
    """Trains, and prints the seconds of the parts as JSON."""
    from dskd_keras.experiment import pipeline

    _watch()
    _seconds["start-up"] = time.time() - float(start)
    with contextlib.redirect_stdout(sys.stderr):
        status = dskd_commands.train([
            "--teacher", teacher, "--student", student, "--dataset", f"{folder}/images.npz",
            "--teacher_weights", f"{folder}/teacher.weights.h5", "--epochs", epochs,
            "--run_dir", f"{folder}/run-{start}", "--augmentation", "crop_flip",
            # A teacher that knows nothing has large maps; small steps keep the losses finite.
            "--learning_rate", "1e-5",
        ])  # fmt: skip
    assert pipeline is not None and status == 0
    # What compiles takes longer than the others.
    _seconds["compiling"] = 0.0
    for part, durations in (("steps", _steps), ("evaluation", _evaluations)):
        compiling = sum(durations) - len(durations) * statistics.median(durations)
        _seconds[part] -= compiling
        _seconds["compiling"] += compiling
    print(json.dumps(_seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
