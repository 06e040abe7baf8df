"""What the cached teacher saves: the time of a trial with it, without it, and on fixed targets.

    python benchmarks/trial_cost.py --pair resnet56_resnet20 --train_examples 2000

Trains the pair's student from the beginning, in turn: as a trial of `tune.py` with cached views, as
one without, and with `Distiller.fit` on the same images and teacher outputs held in memory in
float32, all with compilation, evaluation and the same number of steps. The teacher is untrained:
its outputs cost the same. `KERAS_BACKEND` picks the backend.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import jsonargparse
import keras
import numpy as np
from dskd_keras.command_line import parse
from dskd_keras.config import ExperimentConfig
from rich.console import Console

from dskd_keras import data, experiment, teacher_outputs, training
from dskd_keras.distiller import Distiller, Targets
from dskd_keras.tuning.memory import freed_afterwards


def main(
    pair: str = "resnet56_resnet20",
    dataset: str = "cifar100",
    train_examples: int = 2000,
    epochs: int = 2,
    cached_views: int = 2,
    repeats: int = 3,
    json_file: str | None = None,
):
    """Measures what a trial costs.

    Args:
        pair: A file of configs/.
        dataset: As in train.py.
        train_examples: Training images, a tenth of which is held out.
        epochs: Epochs of a trial.
        cached_views: Views of each image.
        repeats: Trials of each kind.
        json_file: Where to write the results too.
    """
    configs = Path(__file__).parent.parent / "configs"
    config = parse(
        ExperimentConfig,
        [
            "--pair", pair, "--dataset", dataset, "--train_examples", str(train_examples),
            "--validation_fraction", "0.1", "--epochs", str(epochs),
        ],
        configs,
        "trial_cost.py",
    )  # fmt: skip
    images = data.load(dataset, train_examples=config.train_examples, validation_fraction=0.1)
    teacher = experiment.create_teacher(config, images)
    for layer in teacher.layers:
        # Untrained, with moving averages of 0 and 1, so deep a model overflows.
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(0.3 * layer.gamma)
    with tempfile.TemporaryDirectory() as folder:
        console = Console(quiet=True)
        views = teacher_outputs.fixed_views(
            images, cached_views, training.augmentation(config, images)
        )
        begin = time.perf_counter()
        outputs = teacher_outputs.compute(
            teacher, None, views, Path(folder) / "outputs", console, lambda: None
        )
        caching = time.perf_counter() - begin
        kinds = {
            "cached": lambda place: _trial(config, teacher, images, place, (views, outputs)),
            "teacher in every step": lambda place: _trial(config, teacher, images, place, None),
            "fixed targets in memory": lambda place: _fixed(
                config, teacher, images, views, outputs
            ),
        }
        seconds = {kind: [] for kind in kinds}
        for repeat in range(repeats):
            for kind, run in kinds.items():
                place = Path(folder) / f"{kind}-{repeat}"
                place.mkdir()
                with freed_afterwards():
                    seconds[kind].append(run(place))
                print(f"{kind}: {seconds[kind][-1]:.1f} s", flush=True)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    fixed = medians["fixed targets in memory"]
    result = {
        "pair": pair,
        "backend": keras.backend.backend(),
        "images": len(images.x_train),
        "epochs": epochs,
        "seconds": seconds,
        "medians": medians,
        "ratios over fixed targets": {kind: value / fixed for kind, value in medians.items()},
        "caching": {"views": cached_views, "seconds": caching},
    }
    print(json.dumps(result, indent=1))
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")


def _distiller(config, teacher, images):
    keras.utils.set_random_seed(0)
    student = experiment.create_student(config, images)
    return Distiller(teacher, student, **experiment.distiller_settings(config))


def _trial(config, teacher, images, place, cached):
    begin = time.perf_counter()
    distiller = _distiller(config, teacher, images)
    batches = None
    if cached is not None:
        batches = teacher_outputs.batches(*cached, distiller, images, config.batch_size, 0)
    training.train(
        config, distiller, images, 0, place, Console(quiet=True), batches=batches, verbose=0
    )
    return time.perf_counter() - begin


def _fixed(config, teacher, images, views, outputs):
    chosen = np.arange(len(images.x_train))
    x = views(0, chosen)
    held = {
        name: array.astype("float32")
        for name, array in outputs(0, chosen, ("logits", "features")).items()
    }
    labels = images.y_train.astype("int32")
    begin = time.perf_counter()
    distiller = _distiller(config, teacher, images)
    steps = -(-len(x) // config.batch_size)
    distiller.compile(
        training.optimizer(config, steps * config.epochs), **training.compile_options()
    )
    distiller.fit(
        x,
        Targets(labels, held),
        batch_size=config.batch_size,
        epochs=config.epochs,
        verbose=0,
        validation_data=training.evaluation_batches(images, "validation"),
    )
    return time.perf_counter() - begin


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
