"""Runs train.py and dies at given moments: `python killed_run.py MOMENT,… FLAG…`, for test_resume.

Each moment has a process of its own (see forks.py).

MOMENT is `PHASE:WHAT:STEPS`, with PHASE `teacher` or `student`, STEPS the number of training steps
done by then, and WHAT one of

    step      after the step, before a checkpoint
    test      in the evaluation at the end of the epoch
    epoch     the epoch is in history.csv, its checkpoint is not yet written
    half      half of the checkpoint is written aside
    aside     all of it is written aside
    renamed   it has its name, older ones are still there
    full      no step kills; the disk is full from here on

or one of `student:trained:0`, `student:saved:0`, `student:evaluated:0` and `teacher:saved:0` after
the training: before the model's file is there, when it is, and before metrics.json is; or
`student:unsaved:0`, where the disk is full when the model is to be saved. `none` lets it run.
"""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import forks
import small
from forks import before, die

import train
from dskd_keras import files, weighting
from dskd_keras.experiment import (
    build,
    checkpoints,
    evaluation,
    pipeline,
    saved_models,
    students,
    teachers,
)

moment = phase = None


def reach(what, steps=0):
    if moment == f"{phase}:{what}:{steps}":
        if what in ("full", "unsaved"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        else:
            die()


def enter(name):
    def hook(*_, **__):
        global phase
        phase = name

    return hook


def after_step(self, batch, logs=None):
    steps = self.steps(self.place_after(batch))
    reach("step", steps)
    reach("full", steps)


def write(path, data):
    if path.parent.name == "checkpoints":
        steps = int(path.name[5:14])
        if moment == f"{phase}:half:{steps}":
            path.with_name(f".{path.stem}.1.tmp").write_bytes(data[: len(data) // 2])
            die()
        if moment == f"{phase}:aside:{steps}":
            path.with_name(f".{path.stem}.1.tmp").write_bytes(data)
            die()
    elif path.name == "metrics.json":
        reach("evaluated")
    write_bytes(path, data)
    if path.parent.name == "checkpoints":
        reach("renamed", steps)


def save_model(model, path, notes):
    reach("trained")
    reach("unsaved")
    save(model, path, notes)
    reach("saved")


before(teachers, "_train", enter("teacher"))
before(students, "train", enter("student"))
before(checkpoints.Checkpointer, "on_train_batch_end", after_step)
before(
    checkpoints.Checkpointer,
    "on_epoch_end",
    lambda self, epoch, logs=None: reach("epoch", (epoch + 1) * self._steps_per_epoch),
)
checkpoints.Checkpointer.on_test_begin = lambda self, logs=None: reach(
    "test", (self._epoch + 1) * self._steps_per_epoch
)
# Keras imports TensorFlow for this, where there is one: once here, or in every process.
weighting.get("softmax").get_config()
build.models.create = small.created
# Neither is killed, and together they take half of the time.
pipeline.report.write = lambda folders: "no report"
evaluation._LATENCY_REPETITIONS = 1
write_bytes, files.write_bytes = files.write_bytes, write
save, saved_models.save_model = saved_models.save_model, save_model


def main(wanted, argv):
    global moment
    moment = wanted
    return train.main(argv)


forks.run(main)
