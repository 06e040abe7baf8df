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
from rich.console import Console

from dskd_keras.distiller import Distiller, Targets
from dskd_keras.experiment import build, cached_targets, training
from dskd_keras.experiment.cached_targets import CachedTargets
from dskd_keras.experiment.command_line import parse
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.run import Run
from dskd_keras.tuning.memory import clean_session


def main(
    pair: str = "resnet56_resnet20",
    dataset: str = "cifar100",
    train_examples: int = 2000,
    epochs: int = 2,
    cached_views: int = 2,
    repeats: int = 3,
    json_file: str | None = None,
) -> None:
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
    fields = {
        "pair": pair, "dataset": dataset, "train_examples": train_examples,
        "validation_fraction": 0.1, "epochs": epochs,
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in fields.items()]
    config = parse(ExperimentConfig, argv, "trial_cost.py")
    console = Console(quiet=True)
    run = Run(config, build.load_data(config, console), console)
    teacher = build.create_teacher(run)
    assert teacher is not None
    for layer in teacher.layers:
        # Untrained, with moving averages of 0 and 1, so deep a model overflows.
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.gamma.assign(0.3 * layer.gamma)
    with tempfile.TemporaryDirectory() as folder:
        views = cached_targets.fixed_views(run.dataset, cached_views, training.augmentation(run))
        begin = time.perf_counter()
        layer = build.teacher_layers(config, teacher)
        cached = cached_targets.compute(run, teacher, views, Path(folder) / "outputs", layer)
        caching = time.perf_counter() - begin
        kinds = {
            "cached": lambda place: _trial(run, teacher, place, cached),
            "teacher in every step": lambda place: _trial(run, teacher, place, None),
            "fixed targets in memory": lambda place: _fixed(run, teacher, cached),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for repeat in range(repeats):
            for kind, measure in kinds.items():
                place = Path(folder) / f"{kind}-{repeat}"
                place.mkdir()
                with clean_session():
                    seconds[kind].append(measure(place))
                print(f"{kind}: {seconds[kind][-1]:.1f} s", flush=True)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    fixed = medians["fixed targets in memory"]
    result = {
        "pair": pair,
        "backend": keras.backend.backend(),
        "images": len(run.dataset.x_train),
        "epochs": epochs,
        "seconds": seconds,
        "medians": medians,
        "ratios over fixed targets": {kind: value / fixed for kind, value in medians.items()},
        "caching": {"views": cached_views, "seconds": caching},
    }
    print(json.dumps(result, indent=1))
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n")


def _distiller(run: Run, teacher: keras.Model) -> Distiller:
    keras.utils.set_random_seed(0)
    return build.distiller(run, teacher, build.create_student(run))


def _trial(run: Run, teacher: keras.Model, place: Path, cached: CachedTargets | None) -> float:
    begin = time.perf_counter()
    distiller = _distiller(run, teacher)
    batches = None if cached is None else cached.batches(run, distiller, 0)
    training.train(run, distiller, 0, place, batches=batches, verbose=0)
    return time.perf_counter() - begin


def _fixed(run: Run, teacher: keras.Model, cached: CachedTargets) -> float:
    config, dataset = run.config, run.dataset
    chosen = np.arange(len(dataset.x_train))
    x = cached.views(0, chosen)
    outputs = cached.outputs(0, chosen, ("logits", "features"))
    held = {name: array.astype("float32") for name, array in outputs.items()}
    begin = time.perf_counter()
    distiller = _distiller(run, teacher)
    steps = -(-len(x) // config.batch_size)
    distiller.compile(
        training.optimizer(config, steps * config.epochs), **training.compile_options()
    )
    distiller.fit(
        x,
        Targets(dataset.y_train.astype("int32"), held),
        batch_size=config.batch_size,
        epochs=config.epochs,
        verbose=0,
        validation_data=training.evaluation_batches(dataset, "validation"),
    )
    return time.perf_counter() - begin


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
