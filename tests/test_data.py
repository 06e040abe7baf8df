import dataclasses
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

from dskd_keras import data
from dskd_keras.data import arrays, kinds
from dskd_keras.data.batches import EvaluationBatches, TrainingBatches
from dskd_keras.data.pixels import normalize
from dskd_keras.errors import InputError
from dskd_keras.experiment import device_images

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def channels_last():
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_last")
    yield
    keras.config.set_image_data_format(before)


def numbered_images(count, size=8):
    """Images that differ in every pixel and from each other, none of them black."""
    rng = np.random.default_rng(7)
    return rng.integers(1, 256, (count, size, size, 3), dtype=np.uint8)


def training_batches(count=10, batch_size=4, **changes):
    settings = {"seed": 3, "mean": MEAN, "std": STD, **changes}
    return TrainingBatches(numbered_images(count), np.arange(count), batch_size, **settings)


def pixels(x):
    """The uint8 images behind a normalised batch."""
    return np.rint((x * np.asarray(STD) + np.asarray(MEAN)) * 255).astype(np.int64)


def one_epoch(batches, epoch=0):
    steps = batches.steps_per_epoch
    return [batches[epoch * steps + step] for step in range(steps)]


def run_script(script, folder, **environment):
    """What a script prints in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Batches ----------------------------------------------------------------------------------------


def test_normalize_matches_the_formula():
    images = numbered_images(5)
    expected = (images / 255.0 - np.asarray(MEAN)) / np.asarray(STD)
    result = normalize(images, MEAN, STD)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("augmentation", ["crop_flip", "crop"])
def test_each_image_is_some_window_of_its_padded_self(channels_last, augmentation):
    """Looks for each image's own offset and flip by trying all of them, image by image."""
    images = numbered_images(200)
    batches = training_batches(200, 200, augmentation=augmentation)
    x, y = batches[0]
    found = []
    for image, label in zip(pixels(x), y, strict=True):
        padded = np.pad(images[label], ((4, 4), (4, 4), (0, 0)))  # black before normalisation
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if (padded[top : top + 8, left : left + 8][:, :: -1 if flip else 1] == image).all()
        ]
        assert len(matches) == 1
        found += matches
    tops, lefts, flips = map(np.asarray, zip(*found, strict=True))
    assert set(tops) == set(lefts) == set(range(9))
    # Independent of each other: 200 draws of 81 windows meet at least 60 different ones.
    assert len(set(found)) > 60
    if augmentation == "crop":
        assert not flips.any()
    else:
        assert 60 < flips.sum() < 140


def test_without_augmentation_images_only_move(channels_last):
    batches = training_batches(augmentation="none")
    for x, y in one_epoch(batches):
        np.testing.assert_array_equal(pixels(x), numbered_images(10)[y])


def test_a_batch_depends_on_seed_epoch_and_step_alone():
    first = training_batches()
    again = training_batches()
    order = [5, 0, 3, 4, 1, 2]  # any order of asking, across two epochs
    for index, (x, y) in {index: again[index] for index in order}.items():
        np.testing.assert_array_equal(x, first[index][0])
        np.testing.assert_array_equal(y, first[index][1])


def test_other_seeds_and_epochs_give_other_batches():
    batches = training_batches(40, 40)
    other_seed = training_batches(40, 40, seed=4)
    assert (batches[0][1] != batches[1][1]).any()
    assert (batches[0][1] != other_seed[0][1]).any()
    same_image = np.argsort(batches[0][1]), np.argsort(batches[1][1])
    assert (batches[0][0][same_image[0]] != batches[1][0][same_image[1]]).any()


def test_each_epoch_visits_each_image_once_and_ends_with_a_smaller_batch():
    batches = training_batches(10, 4)
    assert batches.steps_per_epoch == 3
    for epoch in range(3):
        labels = [y for _, y in one_epoch(batches, epoch)]
        assert [len(y) for y in labels] == [4, 4, 2]
        assert sorted(np.concatenate(labels)) == list(range(10))
        assert labels[0].dtype == np.int32


@pytest.mark.parametrize("done", [6, 7])
def test_first_batch_continues_the_uninterrupted_run(done):
    whole, resumed = training_batches(), training_batches(first_batch=done)
    for index in range(6):
        for part, of_whole in zip(resumed[index], whole[done + index], strict=True):
            np.testing.assert_array_equal(part, of_whole)


def test_threads_see_the_same_batches():
    batches = training_batches(64, 4)
    expected = [training_batches(64, 4)[index][1] for index in range(128)]
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda index: batches[index][1], range(128)))
    np.testing.assert_array_equal(seen, expected)


def test_channels_first_is_the_same_batch_transposed(channels_last):
    expected = training_batches()[0][0]
    keras.config.set_image_data_format("channels_first")
    result = training_batches()[0][0]
    assert result.shape == (4, 3, 8, 8)
    np.testing.assert_array_equal(result.transpose(0, 2, 3, 1), expected)


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize("augmentation", ["crop_flip", "crop", "none"])
def test_a_device_makes_the_bits_of_the_host(augmentation, layout, channels_last):
    keras.config.set_image_data_format(layout)
    x = np.random.default_rng(0).integers(0, 256, (50, 10, 8, 3), dtype=np.uint8)
    dataset = SimpleNamespace(x_train=x, mean=MEAN, std=STD)
    arguments = (x, np.arange(50), 16, 3, MEAN, STD, augmentation)
    host, moved = TrainingBatches(*arguments), device_images.MovedBatches(*arguments)
    device = device_images.DeviceImages(dataset)
    for index in range(6):
        (made_by, labels), (images, expected_labels) = moved[index], host[index]
        made = device(made_by)
        assert keras.backend.standardize_dtype(made.dtype) == "float32"
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(made), images)
        np.testing.assert_array_equal(labels, expected_labels)
        # What goes to the device in a step: 13 bytes an image, and its label.
        assert sum(part.nbytes for part in made_by.values()) == 13 * len(labels)


def test_evaluation_batches_are_finite_in_order_and_unchanged(channels_last):
    images, labels = numbered_images(10), np.arange(10)
    batches = EvaluationBatches(images, labels, 4, MEAN, STD)
    assert batches.num_batches == 3
    x, y = map(np.concatenate, zip(*batches, strict=True))
    np.testing.assert_array_equal(pixels(x), images)
    np.testing.assert_array_equal(y, labels)
    with pytest.raises(IndexError):
        batches[3]


def recording_model():
    """A model whose variable takes up the first pixel of each image it is trained on."""

    class Recorder(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)
            self.sums = self.add_weight(shape=(64,), initializer="zeros", trainable=False)
            self.step = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x, training=False):
            if training:
                at = keras.ops.one_hot(keras.ops.cast(self.step, "int32"), 64)
                self.sums.assign(self.sums + at * keras.ops.cast(keras.ops.mean(x), "float32"))
                self.step.assign(self.step + 1)
            return self.dense(keras.ops.mean(x, axis=(1, 2, 3))[:, None])

    model = Recorder()
    model.compile("sgd", "mse")
    return model


def test_fit_sees_the_epochs_in_order_and_resumes_in_place():
    """On every backend, with what each prefetches and however often it starts an epoch."""
    batches = training_batches(10, 4)
    steps = batches.steps_per_epoch
    expected = [float(np.mean(batches[index][0])) for index in range(3 * steps)]

    model = recording_model()
    model.fit(batches, steps_per_epoch=steps, epochs=3, verbose=0, shuffle=False)
    seen = keras.ops.convert_to_numpy(model.sums)
    assert int(model.step) == 3 * steps
    np.testing.assert_allclose(seen[: 3 * steps], expected, rtol=1e-4, atol=1e-5)

    resumed = recording_model()
    resumed.fit(
        training_batches(10, 4, first_batch=steps),
        steps_per_epoch=steps,
        initial_epoch=1,
        epochs=3,
        verbose=0,
        shuffle=False,
    )
    seen = keras.ops.convert_to_numpy(resumed.sums)
    np.testing.assert_allclose(seen[: 2 * steps], expected[steps:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentation": "crop_flop"}, "augmentation: .*'crop_flip'"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 0.5}, "seed: 0.5 should be a whole number"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 4.0}, "batch_size: 4.0 should be a whole number of at least 1"),
        ({"first_batch": -1}, "first_batch: -1"),
    ],
)
def test_batches_refuse_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        training_batches(**changes)


# Data sets --------------------------------------------------------------------------------------


def small_dataset(**changes):
    settings = {
        "name": "small",
        "x_train": numbered_images(6),
        "y_train": np.asarray([0, 1, 2, 0, 1, 2], np.int32),
        "x_test": numbered_images(3),
        "y_test": np.asarray([0, 1, 2], np.int32),
        "class_names": ("a", "b", "c"),
        "mean": MEAN,
        "std": STD,
    }
    return data.ImageDataset(**{**settings, **changes})


@pytest.mark.once
def test_digits():
    digits = data.load("digits")
    assert digits.input_shape == (32, 32, 3)
    assert digits.num_classes == 10
    assert digits.x_train.dtype == np.uint8
    assert digits.y_train.dtype == np.int32
    assert len(digits.x_train) + len(digits.x_test) == 1797
    assert 0.19 < len(digits.x_test) / 1797 < 0.21
    assert digits.augmentation == "crop"
    assert digits.x_train.max() > 240
    counts = np.bincount(digits.y_test)
    assert counts.min() > 0.9 * counts.max()
    assert "held out" in digits.notes[0]


@pytest.mark.once
def test_statistics_are_those_of_the_training_images():
    digits = data.load("digits", train_examples=50)
    scaled = digits.x_train.astype(np.float64) / 255
    np.testing.assert_allclose(digits.mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(digits.std, scaled.std(axis=(0, 1, 2)), rtol=1e-12)


def test_a_constant_channel_has_no_zero_deviation():
    images = np.full((2, 4, 4, 2), 51, np.uint8)
    images[0, ..., 1] = 0
    assert arrays.channel_statistics(images) == ((0.2, 0.1), (1.0, 0.1))


def rows(images):
    return {image.tobytes() for image in images}


@pytest.mark.once
def test_subset_and_validation_are_balanced_disjoint_and_fixed():
    whole = data.load("digits")
    part = data.load("digits", train_examples=200, validation_fraction=0.25)
    again = data.load("digits", train_examples=200, validation_fraction=0.25)
    assert len(part.x_train) == 150
    assert len(part.x_validation) == 50
    assert np.ptp(np.bincount(part.y_train)) <= 2
    assert np.ptp(np.bincount(part.y_validation)) <= 2
    assert not rows(part.x_train) & rows(part.x_validation)
    assert not rows(part.x_validation) & rows(part.x_test)
    assert rows(part.x_train) | rows(part.x_validation) <= rows(whole.x_train)
    np.testing.assert_array_equal(part.x_test, whole.x_test)
    np.testing.assert_array_equal(part.x_train, again.x_train)
    np.testing.assert_array_equal(part.y_validation, again.y_validation)


@pytest.mark.once
def test_any_number_of_training_images_up_to_all_of_them():
    whole = data.load("digits")
    total = len(whole.x_train)
    assert len(data.load("digits", train_examples=total - 3).x_train) == total - 3
    all_of_them = data.load("digits", train_examples=total)
    assert all_of_them.fingerprint == whole.fingerprint


@pytest.mark.once
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_examples": 0}, "train_examples: 0"),
        ({"train_examples": 5}, "train_examples: 5 .*from 10"),
        ({"train_examples": 5000}, "train_examples: 5000 .*to 1438"),
        ({"validation_fraction": 1.0}, "validation_fraction: 1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction: -0.1"),
        ({"validation_fraction": 0.001}, "validation_fraction: 0.001"),
        ({"validation_fraction": 0.999}, "validation_fraction: .* between 1 and 1428"),
        ({"image_size": 0}, "image_size: 0"),
    ],
)
def test_load_refuses_numbers_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        data.load("digits", **settings)


def test_a_class_with_one_image_stays_in_training():
    labels = np.asarray([0] * 10 + [1] * 10 + [2])
    rest, chosen = arrays.stratified_split(labels, 4, "validation_fraction")
    assert 20 in rest
    assert sorted([*rest, *chosen]) == list(range(21))
    assert np.bincount(labels[chosen]).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": np.asarray([0, 1, 3])}, "y_test: labels from 0 to 3 .* 0 … 2"),
        ({"y_train": np.asarray([-1, 1, 2, 0, 1, 2])}, "y_train: labels from -1"),
        ({"y_train": np.zeros(6)}, "y_train: .*float64"),
        ({"y_train": np.zeros(5, int)}, r"y_train: shape \(5,\) .* should be \(6,\)"),
        (
            {"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.zeros(0, int)},
            r"x_train: shape \(0, .*none of them 0",
        ),
        ({"x_train": np.zeros((6, 8, 8, 3))}, "x_train: .*uint8"),
        ({"x_train": np.zeros((6, 8, 8), np.uint8)}, r"x_train: shape \(6, 8, 8\)"),
        ({"x_test": np.zeros((3, 9, 9, 3), np.uint8)}, "x_test: .* training images"),
        ({"class_names": ("a",)}, "1 class"),
        ({"std": (0.1, 0.0, 0.1)}, "std: .*positive"),
        ({"mean": (0.1,)}, "mean: .* 3 channels"),
        ({"augmentation": "flip"}, "augmentation: "),
    ],
)
def test_dataset_refuses_arrays_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        small_dataset(**changes)
    assert "\n" not in str(caught.value)


def test_fingerprint_follows_the_training_part(monkeypatch):
    images = np.arange(6 * 8 * 8 * 3).reshape(6, 8, 8, 3) % 251
    dataset = small_dataset(x_train=images.astype(np.uint8))
    print_of = dataset.fingerprint
    changed = dataset.x_train.copy()
    changed[0, 0, 0, 0] ^= 1
    same = dataclasses.replace(dataset, name="other", x_test=dataset.x_test[::-1])
    assert same.fingerprint == print_of
    wide = dataclasses.replace(dataset, y_train=dataset.y_train.astype(np.int64))
    assert wide.fingerprint == print_of
    others = [
        {"x_train": changed},
        {"y_train": dataset.y_train[::-1]},
        {"mean": (0.5, 0.4, 0.31)},
        {"std": (0.2, 0.25, 0.31)},
        {"class_names": ("a", "b", "c", "d")},
    ]
    prints = {dataclasses.replace(dataset, **other).fingerprint for other in others}
    assert len(prints | {print_of}) == 6
    monkeypatch.setattr("hashlib.blake2b", None)  # a second look hashes nothing
    assert dataset.fingerprint == print_of
    # A constant: the cache of teachers outlives the process, and the version.
    assert print_of == "432fbfca35878601"


def test_a_normalisation_that_is_not_given_is_measured():
    dataset = small_dataset(mean=None)
    np.testing.assert_allclose(dataset.mean, (dataset.x_train / 255).mean(axis=(0, 1, 2)))
    assert dataset.std == STD


def test_large_arrays_go_to_a_file(monkeypatch):
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 1000)
    images = numbered_images(20)
    taken = arrays.take(images, np.arange(19, -1, -1))
    assert isinstance(taken.base, np.memmap)
    np.testing.assert_array_equal(taken, images[::-1])
    monkeypatch.setattr(arrays.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="TMPDIR"):
        arrays.allocate_images((20, 8, 8, 3))


# Kinds ------------------------------------------------------------------------------------------


def test_kinds_are_told_without_keras_and_numpy(tmp_path):
    save_npz(tmp_path)
    (tmp_path / "images").mkdir()
    script = """
        import os, sys

        os.environ["DSKD_KERAS_DEFER"] = "1"
        from dskd_keras.data import kinds
        from dskd_keras.errors import InputError

        names = ("digits", "own.npz", "images", "./images/", "cifar100", "emnist/letters")
        print(*map(kinds.kind, names))
        for name in ("gone.npz", "./gone", "/gone", "~/gone"):
            try:
                kinds.kind(name)
            except InputError as error:
                print(error)
        assert not {"keras", "numpy", "tensorflow_datasets"} & set(sys.modules)
    """
    assert run_script(script, tmp_path).splitlines() == [
        "digits npz folder folder tfds tfds",
        "dataset: there is no file gone.npz.",
        *(
            f"dataset: {name!r} should be an existing folder of images or a .npz file."
            for name in ("./gone", "/gone", "~/gone")
        ),
    ]


def test_a_prepared_set_is_no_folder_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar100" / "3.0.2").mkdir(parents=True)
    assert kinds.kind("cifar100") == "folder"
    (tmp_path / "cifar100" / "3.0.2" / "dataset_info.json").touch()
    assert kinds.kind("cifar100") == "tfds"
    assert kinds.kind(tmp_path / "cifar100") == "folder"


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn.datasets", "scikit-learn"), ("PIL.Image", "pillow")]
)
def test_a_missing_package_is_named(module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"^dataset: the package {package} .*\[train\]'$"):
        data.load("digits")


# .npz -------------------------------------------------------------------------------------------


def npz_arrays(**changes):
    content = {
        "x_train": numbered_images(6),
        "y_train": np.asarray([[0], [1], [2], [0], [1], [2]]),
        "x_test": numbered_images(3),
        "y_test": np.asarray([0, 1, 2]),
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None}


def save_npz(folder, **changes):
    path = folder / "own.npz"
    np.savez(path, **npz_arrays(**changes))
    return path


def test_npz(tmp_path):
    dataset = data.load(save_npz(tmp_path, class_names=np.asarray(["a", "b", "c", "d"])))
    np.testing.assert_array_equal(dataset.x_train, numbered_images(6))
    assert dataset.y_train.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.class_names == ("a", "b", "c", "d")
    assert dataset.name == "own"
    assert any("'d'" in note for note in dataset.notes)
    assert data.load(save_npz(tmp_path)).class_names == ("0", "1", "2")


def test_npz_grey_images_and_resizing(tmp_path):
    grey = npz_arrays()["x_train"][..., 0], npz_arrays()["x_test"][..., 0]
    path = save_npz(tmp_path, x_train=grey[0], x_test=grey[1])
    assert data.load(path).input_shape == (8, 8, 1)
    resized = data.load(path, image_size=16)
    expected = Image.fromarray(grey[0][2]).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized.x_train[2, ..., 0], np.asarray(expected))


@pytest.mark.parametrize(
    "convert", [lambda x: x / 255, lambda x: x.astype(np.float32), lambda x: x.astype(np.int64)]
)
def test_npz_other_types_of_the_same_images(tmp_path, convert):
    path = save_npz(
        tmp_path, x_train=convert(numbered_images(6)), x_test=convert(numbered_images(3))
    )
    np.testing.assert_array_equal(data.load(path).x_train, numbered_images(6))


FRACTIONS = np.linspace(0, 1, 6 * 64).reshape(6, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None, "x_test": None}, "has no x_test, y_test; .* x_train, y_train"),
        ({"x_train": FRACTIONS * 2 - 1, "x_test": FRACTIONS}, "x_train .*fractions"),
        ({"x_train": FRACTIONS * 2, "x_test": FRACTIONS}, "x_train .*fractions"),
        ({"x_train": np.rint(FRACTIONS), "x_test": FRACTIONS}, "x_train .*fractions"),
        ({"x_train": FRACTIONS * np.nan, "x_test": FRACTIONS}, "x_train .*384 of 384 values"),
        ({"x_train": FRACTIONS, "x_test": FRACTIONS * 255}, r"x_test .* \[0, 1\]"),
        ({"x_train": np.rint(FRACTIONS * 255), "x_test": FRACTIONS}, "x_test .*whole"),
        ({"x_train": FRACTIONS}, "x_test .*dtype uint8 .*float64"),
        ({"x_train": numbered_images(6).astype(int) + 1}, "x_train .*255"),
        ({"x_train": numbered_images(6).transpose(0, 3, 1, 2)}, "channels"),
        ({"x_train": np.zeros((6, 8), np.uint8)}, "shape"),
        ({"x_train": np.full((6, 8, 8), "a")}, "dtype"),
        ({"x_train": np.full((6, 8, 8), None)}, "plain arrays"),
        ({"x_train": np.zeros((0, 8, 8, 3), np.uint8)}, "none of them 0"),
        ({"y_test": np.asarray([0, 1, 3])}, "y_test: labels from 0 to 3"),
        ({"y_train": np.eye(6)}, "y_train"),
        ({"y_train": np.zeros(6)}, "y_train .*integers"),
        ({"y_train": np.zeros(6, int)}, "1 class"),
        ({"class_names": np.asarray(["a", "b"])}, "y_train: labels from 0 to 2"),
    ],
)
def test_npz_that_can_not_be_used(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        data.load(save_npz(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_npz_files_that_can_not_be_read(tmp_path):
    path = save_npz(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    single = tmp_path / "array.npy"
    np.save(single, np.zeros(3))
    for content in (whole[: len(whole) // 2], b"", b"no archive", flipped, single.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"own\.npz can't be read"):
            data.load(path)
    with pytest.raises(InputError, match=r"no file .*missing\.npz"):
        data.load(tmp_path / "missing.npz")


# Folders ----------------------------------------------------------------------------------------


def save_images(folder, images, suffix=".png"):
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03}{suffix}")


def test_folder_with_train_and_test(tmp_path):
    images = numbered_images(12)
    save_images(tmp_path / "train" / "dog", images[:3])
    save_images(tmp_path / "train" / "cat", images[3:8], ".bmp")
    save_images(tmp_path / "val" / "dog", images[8:10])
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    dataset = data.load(tmp_path)
    assert dataset.class_names == ("cat", "dog")
    np.testing.assert_array_equal(dataset.x_train, np.concatenate([images[3:8], images[:3]]))
    assert dataset.y_train.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(dataset.x_test, images[8:10])
    assert dataset.y_test.tolist() == [1, 1]
    assert dataset.notes == ()
    save_images(tmp_path / "test" / "cat", images[10:])
    dataset = data.load(tmp_path)
    np.testing.assert_array_equal(dataset.x_test, images[10:])
    assert dataset.notes == ("the folder 'val' is not used",)


def test_folder_of_classes_holds_a_fifth_out(tmp_path):
    images = numbered_images(60)
    save_images(tmp_path / "a", images[:40])
    save_images(tmp_path / "b", images[40:])
    dataset = data.load(tmp_path)
    assert np.bincount(dataset.y_test).tolist() == [8, 4]
    assert rows(dataset.x_train) | rows(dataset.x_test) == rows(images)
    assert "12 of 60 images are held out" in dataset.notes[0]
    labels = {image.tobytes(): int(index >= 40) for index, image in enumerate(images)}
    assert [labels[image.tobytes()] for image in dataset.x_train] == dataset.y_train.tolist()
    assert data.load(tmp_path).fingerprint == dataset.fingerprint


def test_folder_with_images_of_different_sizes(tmp_path):
    save_images(tmp_path / "a", numbered_images(3))
    save_images(tmp_path / "b", numbered_images(3, size=10))
    with pytest.raises(InputError, match=r"8×8 .*10×10; .*--image_size"):
        data.load(tmp_path)
    dataset = data.load(tmp_path, image_size=6)
    assert dataset.input_shape == (6, 6, 3)
    expected = Image.fromarray(numbered_images(3)[0]).resize((6, 6), Image.Resampling.BILINEAR)
    assert np.asarray(expected).tobytes() in rows([*dataset.x_train, *dataset.x_test])


def test_folder_images_become_rgb(tmp_path):
    grey = numbered_images(4)[..., 0]
    save_images(tmp_path / "a", grey)
    save_images(tmp_path / "b", np.dstack([grey[0]] * 4)[None].repeat(4, 0))
    dataset = data.load(tmp_path)
    assert dataset.input_shape == (8, 8, 3)
    assert (dataset.x_train[..., :1] == dataset.x_train).all()


def test_folder_with_an_unreadable_image(tmp_path):
    save_images(tmp_path / "a", numbered_images(3))
    save_images(tmp_path / "b", numbered_images(3))
    broken = tmp_path / "b" / "001.png"
    content = broken.read_bytes()
    for damage in (content[: len(content) // 2], b"", b"no image"):
        broken.write_bytes(damage)
        with pytest.raises(InputError, match=r"b.001\.png can't be read"):
            data.load(tmp_path)
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(broken)
    with pytest.raises(InputError, match="8 bits"):
        data.load(tmp_path)


def test_folders_that_hold_no_data_set(tmp_path):
    with pytest.raises(InputError, match="one folder a class, and holds none"):
        data.load(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"a should hold the images of a class"):
        data.load(tmp_path)
    save_images(tmp_path / "test" / "b", numbered_images(2))
    with pytest.raises(InputError, match="'test' but no folder 'train'"):
        data.load(tmp_path)
    save_images(tmp_path / "train" / "a", numbered_images(2))
    save_images(tmp_path / "train" / "c", numbered_images(2))
    with pytest.raises(InputError, match="class 'b'"):
        data.load(tmp_path)
    with pytest.raises(InputError, match="missing' should be an existing folder"):
        data.load(tmp_path / "missing")


def test_folder_with_too_few_images_to_hold_out(tmp_path):
    save_images(tmp_path / "a", numbered_images(1))
    save_images(tmp_path / "b", numbered_images(2))
    with pytest.raises(InputError, match="can't set 2 of 3 images"):
        data.load(tmp_path)


@pytest.mark.once
def test_everything_but_tfds_works_without_tensorflow(tmp_path):
    save_npz(tmp_path)
    save_images(tmp_path / "images" / "a", numbered_images(5))
    save_images(tmp_path / "images" / "b", numbered_images(5))
    script = """
        import sys

        sys.modules.update(tensorflow=None, tensorflow_datasets=None)  # as if not installed
        from dskd_keras import data
        from dskd_keras.errors import InputError

        print(data.load("digits").fingerprint)
        print(data.load("own.npz").fingerprint)
        print(data.load("images").fingerprint)
        try:
            data.load("cifar100")
        except InputError as error:
            print(error)
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        backend = next((name for name in ("jax", "torch") if find_spec(name)), None)
    if backend is None:
        pytest.skip("needs JAX or PyTorch")
    lines = run_script(script, tmp_path, KERAS_BACKEND=backend).splitlines()
    # The same contents have the same fingerprint in another process.
    assert lines[:3] == [
        data.load(source).fingerprint
        for source in ("digits", tmp_path / "own.npz", tmp_path / "images")
    ]
    assert "tensorflow-datasets is not installed" in lines[3]
    assert "pip install 'dskd-keras[tfds]'" in lines[3]
