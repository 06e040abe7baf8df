"""What checkpoints cost: the time of training steps with and without one, in one run.

    python benchmarks/checkpoint_cost.py --pair resnet110_resnet32

Distills the pair's models on random images of CIFAR-100's shape, with a checkpoint at every tenth
step, and compares those steps with the others. `KERAS_BACKEND` picks the backend.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jsonargparse
import keras
import numpy as np

from dskd_keras import Distiller, models
from dskd_keras.experiment.checkpoints import Checkpointer, CheckpointFolder
from dskd_keras.experiment.command_line import parse
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.interruption import StopRequest
from dskd_keras.experiment.training import compile_options
from dskd_keras.optimizers import SGD

EVERY = 10


class Steps(keras.callbacks.Callback):
    """Times whole steps: from the beginning of one to the beginning of the next."""

    def __init__(self):
        """Has no times yet."""
        super().__init__()
        self.times = []

    def on_train_batch_begin(self, batch, logs=None):
        """Notes the time."""
        self.times.append(time.perf_counter())


class NothingElse:
    """A record of a run that has nothing to keep beside its model."""

    def snapshot(self):
        """Returns no weights and no notes."""
        return [], {}


def main(pair: str = "resnet110_resnet32", steps: int = 82):
    """Measures what checkpoints cost.

    Args:
        pair: A file of configs/.
        steps: Training steps.
    """
    config = parse(ExperimentConfig, ["--pair", pair], "checkpoint_cost.py")

    rng = np.random.default_rng(0)
    images = rng.standard_normal((config.batch_size, 32, 32, 3), dtype="float32")
    labels = rng.integers(0, 100, config.batch_size)
    teacher, student = (
        models.create(name, 100, (32, 32, 3)) for name in (config.teacher, config.student)
    )
    distiller = Distiller(teacher, student, config.student_layers)
    # Noise teaches nothing; with a small rate at least nothing diverges.
    distiller.compile(SGD(1e-6, config.momentum), **compile_options())

    def batches():
        while True:
            yield images, labels

    with tempfile.TemporaryDirectory() as folder, StopRequest(lambda: None) as stop:
        checkpoints = CheckpointFolder(Path(folder))
        checkpointer = Checkpointer(checkpoints, EVERY, steps + 1, stop, NothingElse())
        timed = Steps()
        distiller.fit(
            batches(),
            steps_per_epoch=steps,
            shuffle=False,
            verbose=0,
            callbacks=[timed, checkpointer],
        )
        size = max(path.stat().st_size for path in Path(folder).iterdir())
    seconds = np.diff(timed.times)
    saved = (np.arange(len(seconds)) + 1) % EVERY == 0
    # The first step compiles.
    without, with_one = (statistics.median(seconds[1:][part[1:]]) for part in (~saved, saved))
    cost = with_one - without
    print(f"{pair}, {keras.backend.backend()}, {config.student} with heads")
    print(f"a step without a checkpoint  {1000 * without:8.1f} ms (median of {sum(~saved) - 1})")
    print(f"a step with one              {1000 * with_one:8.1f} ms (median of {sum(saved)})")
    print(f"a checkpoint                 {1000 * cost:8.1f} ms, {size / 2**20:.1f} MiB")
    share = cost / (config.checkpoint_steps * without)
    print(f"one every {config.checkpoint_steps} steps makes training {100 * share:.2f} % longer")


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
