"""The teacher's outputs for fixed views, computed once and kept."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from rich.console import Console
from small import convnet

import dskd_keras
from dskd_keras.data import FixedViews, ImageDataset, normalize
from dskd_keras.errors import InputError, TrainingError
from dskd_keras.experiment import build, cached_targets, training
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.run import Run


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 8, 8, 2)).astype("uint8")
    labels = np.arange(20).astype("int32") % 3
    return ImageDataset(
        "noise", pixels, labels, pixels[:6], labels[:6], ("a", "b", "c"), (0.5, 0.5), (0.3, 0.3),
        x_validation=pixels[:6], y_validation=labels[:6],
    )  # fmt: skip


def run_on(dataset, **fields):
    config = ExperimentConfig("resnet8", "resnet8", batch_size=8, **fields)
    return Run(config, dataset, Console(quiet=True))


def cache(dataset, folder, views=3, teacher=None, **fields):
    views = cached_targets.fixed_views(dataset, views, "crop_flip")
    teacher = teacher or convnet("teacher", 6)
    run = run_on(dataset, **fields)
    layer = build.teacher_layers(run.config, teacher)
    return cached_targets.compute(run, teacher, views, folder, layer)


@pytest.mark.once
def test_plain_distillation_keeps_logits_alone(dataset, tmp_path):
    cached = cache(dataset, tmp_path, views=1, method="kd")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits-000.npy"]
    assert cached.outputs(0, np.arange(4), ["logits"])["logits"].shape == (4, 3)


@pytest.mark.parametrize("layers", ["auto", None, ["stage1", "stage2"]])
def test_cached_outputs_are_the_teachers(dataset, tmp_path, layers):
    teacher = convnet("teacher", 6)
    distiller = dskd_keras.Distiller(
        teacher, convnet("student"), ["stage1", "stage2"], teacher_layer=layers
    )
    cached = cache(dataset, tmp_path, teacher=teacher, teacher_layer=layers)
    batches = cached.batches(run_on(dataset), distiller, seed=1)(0)
    assert batches.steps_per_epoch == 3
    seen, given, expected = [], [], []
    for index in range(2 * 3 * 3):
        x, targets = batches[index]
        seen += [(index // 3 % 3, image.tobytes()) for image in x]
        given.append(targets.teacher)
        expected.append(x)
    # All at once: programs are compiled for every shape.
    expected = distiller.teacher.predict(np.concatenate(expected))
    assert set(expected) == {"logits", *distiller.teacher.feature_names}
    assert len(expected) == (3 if layers in ("auto", ["stage1", "stage2"]) else 2)
    for name in expected:
        values = np.concatenate([outputs[name] for outputs in given])
        assert values.dtype == np.float16
        # Half precision has eleven binary digits.
        np.testing.assert_allclose(values, expected[name], rtol=6e-4, atol=1e-3)
    # Every image once an epoch, three views of each, the same ones again after three epochs.
    assert len(seen) == 6 * 20 and len(set(seen)) == 3 * 20


def test_views_are_augmented_and_the_same_everywhere(dataset):
    first, again = (
        FixedViews(dataset.x_train, 2, "crop_flip", (0.5, 0.5), (0.3, 0.3)) for _ in range(2)
    )
    chosen = np.array([3, 7, 11])
    np.testing.assert_array_equal(first(1, chosen), again(1, chosen)[:])
    np.testing.assert_array_equal(first(1, chosen)[1:2], first(1, chosen[1:2]))
    assert not np.array_equal(first(0, chosen), first(1, chosen))
    plain = cached_targets.fixed_views(dataset, 5, "none")
    assert plain.count == 1
    expected = normalize(dataset.x_train[chosen], dataset.mean, dataset.std)
    np.testing.assert_array_equal(plain(0, chosen), expected)


def test_training_on_cached_outputs_is_training_under_the_teacher(dataset, tmp_path):
    """One step on the same images: the losses differ by half precision alone."""
    teacher = convnet("teacher", 6)
    losses = []
    for cached in (False, True):
        keras.utils.set_random_seed(1)
        distiller = dskd_keras.Distiller(teacher, convnet("student"), ["stage1", "stage2"])
        distiller.compile(keras.optimizers.SGD(0.0), **training.compile_options())
        batches = cache(dataset, tmp_path, teacher=teacher).batches(
            run_on(dataset), distiller, seed=1
        )(0)
        x, targets = batches[0]
        y = targets if cached else targets.label
        losses.append(distiller.train_on_batch(x, y, return_dict=True))
    for name in losses[0]:
        assert losses[1][name] == pytest.approx(losses[0][name], rel=2e-3, abs=1e-4), name


def test_outputs_are_computed_once_and_an_interrupted_computation_goes_on(
    dataset, tmp_path, monkeypatch
):
    teacher = convnet("teacher", 6)
    runs = []
    compute_view = cached_targets._compute_view

    def compute(frozen, views, view, *rest):
        runs.append(view)
        if len(runs) == 2:
            raise KeyboardInterrupt
        compute_view(frozen, views, view, *rest)

    monkeypatch.setattr(cached_targets, "_compute_view", compute)
    with pytest.raises(KeyboardInterrupt):
        cache(dataset, tmp_path, teacher=teacher)
    cache(dataset, tmp_path, teacher=teacher)
    cache(dataset, tmp_path, teacher=teacher)
    assert runs == [0, 1, 1, 2]
    # Logits and two maps.
    assert len(list(tmp_path.glob("*.npy"))) == 3 * 3


def test_their_name_stands_for_everything_that_shapes_them(dataset):
    teacher = convnet("teacher", 6)
    key = cached_targets.key(teacher, None, dataset, "crop")
    assert key == cached_targets.key(teacher, None, dataset, "crop")
    others = [
        cached_targets.key(teacher, "stage1", dataset, "crop"),
        cached_targets.key(teacher, None, dataset, "none"),
    ]
    teacher.set_weights([weight + 1e-6 for weight in teacher.get_weights()])
    others.append(cached_targets.key(teacher, None, dataset, "crop"))
    assert len({key, *others}) == 4


def test_outputs_that_do_not_fit_are_refused(dataset, tmp_path, monkeypatch):
    teacher = convnet("teacher", 6)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"cached_views: the outputs of 3 view\(s\) need .* MiB"):
        cache(dataset, tmp_path, teacher=teacher)
    monkeypatch.undo()
    teacher.set_weights([1e4 * weight for weight in teacher.get_weights()])
    with pytest.raises(TrainingError, match="not finite in half precision"):
        cache(dataset, tmp_path, teacher=teacher)
