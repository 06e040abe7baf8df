import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from dskd_keras import data
from dskd_keras.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("tensorflow")

ROOT = Path(__file__).resolve().parents[1]
PREPARED = ROOT.parent / "shared" / "tfds"


def stripes(count, height=6, width=5, first=0):
    """Images that say by their pixels which one they are."""
    images = np.zeros((count, height, width, 3), np.uint8)
    images[..., 0] = (first + np.arange(count))[:, None, None]
    images[..., 1] = 10 * np.arange(width)
    return images


class StripeBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A real builder with nothing to download; subclasses say what it holds."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS: ClassVar = {"train": [stripes(300)], "test": [stripes(20, first=100)]}
    FEATURES: ClassVar = {
        "image": tfds.features.Image(shape=(6, 5, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["even", "odd"]),
    }
    SUPERVISED = ("image", "label")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self.FEATURES),
            supervised_keys=self.SUPERVISED,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        images = [image for part in self.SPLITS[split] for image in part]
        for index, image in enumerate(images):
            yield index, {"image": image, "label": self.label(split, index)}

    def label(self, split, index):
        return index % 2


class DskdStripes(StripeBuilder):
    pass


class DskdStripesValidation(StripeBuilder):
    SPLITS: ClassVar = {
        "train": [stripes(20)],
        "validation": [stripes(10, first=100)],
        "test": [stripes(10)],
    }

    def label(self, split, index):
        return -1 if split == "test" else index % 2


class DskdStripesTrain(StripeBuilder):
    SPLITS: ClassVar = {"train": [stripes(50)]}


class DskdStripesSizes(StripeBuilder):
    SPLITS: ClassVar = {"train": [stripes(5), stripes(5, 8, 8)], "test": [stripes(5)]}
    FEATURES: ClassVar = {
        **StripeBuilder.FEATURES,
        "image": tfds.features.Image(encoding_format="png"),
    }


class DskdStripesUnsupervised(StripeBuilder):
    SUPERVISED = None


class DskdStripesFailing(StripeBuilder):
    def _split_generators(self, dl_manager):
        raise ConnectionError("the site\nis gone")


def test_a_set_is_prepared_and_read_in_stored_order(tmp_path):
    dataset = data.load("dskd_stripes", data_dir=tmp_path)
    assert dataset.name == "dskd_stripes"
    assert dataset.class_names == ("even", "odd")
    assert dataset.input_shape == (6, 5, 3)
    assert (len(dataset.x_train), len(dataset.x_test)) == (300, 20)
    # Each image still has its own label, and reading it again gives the same order.
    np.testing.assert_array_equal(dataset.x_train[:, 0, 0, 0] % 2, dataset.y_train)
    np.testing.assert_array_equal(
        np.sort(dataset.x_train[:, 0, 0, 0]), np.sort(np.arange(300) % 256)
    )
    np.testing.assert_array_equal(dataset.x_train[0, 0, :, 1], 10 * np.arange(5))
    assert dataset.augmentation == "crop_flip"
    scaled = dataset.x_train / 255
    np.testing.assert_allclose(dataset.mean, scaled.mean(axis=(0, 1, 2)))
    assert data.load("dskd_stripes", data_dir=tmp_path).fingerprint == dataset.fingerprint


@pytest.mark.once
def test_the_folder_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    data.load("dskd_stripes_train")
    assert (tmp_path / "dskd_stripes_train").is_dir()


@pytest.mark.once
def test_the_validation_split_serves_where_the_test_split_has_no_labels(tmp_path):
    dataset = data.load("dskd_stripes_validation", data_dir=tmp_path)
    assert set(dataset.x_test[:, 0, 0, 0]) == set(range(100, 110))
    assert "validation split is the test set" in dataset.notes[0]


@pytest.mark.once
def test_a_fifth_is_held_out_where_there_is_only_train(tmp_path):
    dataset = data.load("dskd_stripes_train", data_dir=tmp_path)
    assert (len(dataset.x_train), len(dataset.x_test)) == (40, 10)
    assert not set(dataset.x_train[:, 0, 0, 0]) & set(dataset.x_test[:, 0, 0, 0])
    assert "10 of 50 images are held out" in dataset.notes[0]


@pytest.mark.once
def test_different_sizes_need_image_size(tmp_path):
    with pytest.raises(InputError, match=r"differ in size .*--image_size"):
        data.load("dskd_stripes_sizes", data_dir=tmp_path)
    dataset = data.load("dskd_stripes_sizes", data_dir=tmp_path, image_size=12)
    assert dataset.x_train.shape == (10, 12, 12, 3)
    assert set(dataset.x_train[:, 6, 6, 0]) == set(range(5))


def test_sets_that_can_not_be_used(tmp_path):
    with pytest.raises(InputError, match="no set for image classification: it declares no pair"):
        data.load("dskd_stripes_unsupervised", data_dir=tmp_path)
    with pytest.raises(InputError, match="'text' is no image"):
        data.load("imdb_reviews", data_dir=tmp_path)
    assert not any(tmp_path.iterdir())  # refused before anything was prepared


@pytest.mark.once
def test_data_that_can_not_be_had(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="ConnectionError: the site is gone") as caught:
        data.load("dskd_stripes_failing", data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)

    def no_name_service(*args, **kwargs):
        raise OSError("no name service")

    monkeypatch.setattr("socket.getaddrinfo", no_name_service)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(InputError, match=r"no connection to .*cs\.toronto\.edu") as caught:
        data.load("cifar10", data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.once
def test_damaged_data(tmp_path):
    data.load("dskd_stripes", data_dir=tmp_path)
    (record,) = (tmp_path / "dskd_stripes").glob("*/*train.tfrecord*")
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 0xFF
    record.write_bytes(content)
    with pytest.raises(InputError, match=r"can't be read .*prepare it again"):
        data.load("dskd_stripes", data_dir=tmp_path)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "close"),
    [("cifar1000", "'cifar100'"), ("digit", "'digits'"), ("Cifar-100", "'cifar100'")],
)
def test_unknown_names_get_close_ones(tmp_path, name, close):
    with pytest.raises(InputError, match=f"dataset: {name!r} should be") as caught:
        data.load(name, data_dir=tmp_path)
    assert close in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.once
@pytest.mark.parametrize("name", ["cifar100/zzz", "cifar100:9.9.9", "nobody:cifar100"])
def test_malformed_names_are_one_line(tmp_path, name):
    with pytest.raises(InputError, match=name.split(":")[0]) as caught:
        data.load(name, data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.skipif(not (PREPARED / "cifar100").is_dir(), reason="no prepared CIFAR-100")
def test_cifar100():
    dataset = data.load("cifar100", data_dir=PREPARED, train_examples=1000)
    assert dataset.x_train.shape == (1000, 32, 32, 3)
    assert dataset.x_test.shape == (10000, 32, 32, 3)
    assert np.bincount(dataset.y_train).tolist() == [10] * 100
    assert np.bincount(dataset.y_test).tolist() == [100] * 100
    assert dataset.mean == (0.5071, 0.4867, 0.4408)
    assert dataset.std == (0.2675, 0.2565, 0.2761)
    assert dataset.class_names[:2] == ("apple", "aquarium_fish")
    assert dataset.augmentation == "crop_flip"
    assert dataset.notes == ()


# Streams


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the places of images are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dskd_keras"


def streamed(name, folder, **settings):
    return data.load(name, data_dir=folder, stream=True, stream_workers=0, **settings)


def assert_same_images(stream, memory):
    for part in ("train", "test"):
        images, expected = getattr(stream, f"x_{part}"), getattr(memory, f"x_{part}")
        assert isinstance(images, data.ImageStream)
        assert images.shape == expected.shape
        np.testing.assert_array_equal(images[:], expected)
        np.testing.assert_array_equal(getattr(stream, f"y_{part}"), getattr(memory, f"y_{part}"))
    assert (stream.mean, stream.std) == (memory.mean, memory.std)
    assert stream.class_names == memory.class_names
    assert stream.notes == memory.notes


@pytest.mark.parametrize("name", ["dskd_stripes", "dskd_stripes_validation", "dskd_stripes_train"])
def test_a_stream_holds_the_images_in_memory(tmp_path, cache, name):
    memory = data.load(name, data_dir=tmp_path)
    assert_same_images(streamed(name, tmp_path), memory)


@pytest.mark.once
def test_a_stream_of_array_records(tmp_path, cache):
    memory = data.load("dskd_stripes", data_dir=tmp_path / "records")
    builder = tfds.builder("dskd_stripes", data_dir=tmp_path / "arrays", file_format="array_record")
    builder.download_and_prepare()
    stream = streamed("dskd_stripes", tmp_path / "arrays")
    assert_same_images(stream, memory)
    # As it is sent to the processes that decode.
    again = pickle.loads(pickle.dumps(stream.x_train))
    np.testing.assert_array_equal(again[:5], memory.x_train[:5])


def test_a_stream_of_several_files_of_records(tmp_path, cache):
    config = tfds.download.DownloadConfig(num_shards=3)
    builder = tfds.builder("dskd_stripes", data_dir=tmp_path)
    builder.download_and_prepare(download_config=config)
    stream, memory = (
        streamed("dskd_stripes", tmp_path),
        data.load("dskd_stripes", data_dir=tmp_path),
    )
    assert len(list(tmp_path.rglob("*train.tfrecord-*"))) == 3
    # TFDS reads the files of a set in turns: another order.
    numbers = stream.x_train[:][:, 0, 0, 0]
    assert sorted(numbers) == sorted(memory.x_train[:, 0, 0, 0])
    np.testing.assert_array_equal(numbers % 2, stream.y_train)


@pytest.mark.once
def test_the_places_of_images_are_looked_up_once(tmp_path, cache, monkeypatch, capfd):
    first = streamed("dskd_stripes", tmp_path)
    assert "Looking 300 images of 'train' up" in capfd.readouterr().err
    kept = sorted(cache.iterdir())
    assert len(kept) == 2
    assert streamed("dskd_stripes", tmp_path).fingerprint == first.fingerprint
    assert "Looking" not in capfd.readouterr().err
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    assert streamed("dskd_stripes", tmp_path).fingerprint == first.fingerprint
    assert "Looking" in capfd.readouterr().err
    # A cache that can't be written is gone without.
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert streamed("dskd_stripes", tmp_path).fingerprint == first.fingerprint


@pytest.mark.once
def test_records_that_end_too_early_are_refused(tmp_path, cache):
    data.load("dskd_stripes", data_dir=tmp_path)
    (path,) = tmp_path.rglob("*train.tfrecord-*")
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(InputError, match=r"ends within a record\); remove that folder"):
        streamed("dskd_stripes", tmp_path)
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(content[: length + 16])
    with pytest.raises(InputError, match="has 1 of 300 images in 'train'"):
        streamed("dskd_stripes", tmp_path)


@pytest.mark.once
def test_a_stream_of_images_of_several_sizes_needs_image_size(tmp_path, cache):
    with pytest.raises(InputError, match=r"differ in size.* --image_size"):
        streamed("dskd_stripes_sizes", tmp_path)
    stream = streamed("dskd_stripes_sizes", tmp_path, image_size=12)
    assert stream.x_train[:].shape == (10, 12, 12, 3)


@pytest.mark.once
def test_a_stream_needs_no_tensorflow(cache):
    if not (PREPARED / "cifar100").is_dir():
        pytest.skip("needs CIFAR-100")
    script = (
        "import sys\n"
        "from dskd_keras import data\n"
        "read = data.load('cifar100', data_dir=sys.argv[1], stream=True, stream_workers=0)\n"
        "assert read.x_train[:300].shape == (300, 32, 32, 3)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, PREPARED],
        env={**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
