"""Images that stay in their files: the same batches as from memory, whoever decodes them."""

import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from dskd_keras import data
from dskd_keras.data import pixels, prefetching, streams
from dskd_keras.data.pixels import Augmentation
from dskd_keras.errors import InputError, TrainingError

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT.parent / "shared" / "tiny-imagenet-200-sample.zip"


def save_noise(folder, count, size=(12, 10), suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(folder)))
    for index in range(count):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{index:02}{suffix}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """21 training and 9 test images of 12×10 pixels in 3 classes."""
    path = tmp_path_factory.mktemp("images") / "noise"
    for name in "abc":
        save_noise(path / "train" / name, 7)
        save_noise(path / "test" / name, 3)
    return path


def training(dataset, **settings):
    settings = {"augmentation": dataset.augmentation, "seed": 3, "batch_size": 4, **settings}
    return data.TrainingBatches(
        dataset.x_train, dataset.y_train, mean=dataset.mean, std=dataset.std, **settings
    )


def evaluation(dataset):
    return data.EvaluationBatches(
        dataset.x_test, dataset.y_test, 4, mean=dataset.mean, std=dataset.std
    )


def assert_same(batches, expected, indices):
    for index in indices:
        (x, y), (x_expected, y_expected) = batches[index], expected[index]
        np.testing.assert_array_equal(x, x_expected)
        np.testing.assert_array_equal(y, y_expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_batches_of_the_images_in_memory(folder, workers):
    memory = data.load(folder)
    stream = data.load(folder, stream=True, stream_workers=workers)
    assert isinstance(stream.x_train, data.ImageStream)
    assert (stream.mean, stream.std) == (memory.mean, memory.std)
    assert stream.input_shape == memory.input_shape == (12, 10, 3)
    for augmentation in data.AUGMENTATIONS if workers == 0 else ["crop_flip"]:
        batches = training(stream, augmentation=augmentation)
        # On, back, and on from another place; into the next epochs, whose last batch has one image.
        places = [0, 1, 2, 0, 5, 6, 7, 13]
        assert_same(batches, training(memory, augmentation=augmentation), places)
        batches.close()
    batches = evaluation(stream)
    assert_same(batches, evaluation(memory), [0, 1, 2, 0, 1, 2, 1])
    batches.close()


def test_a_stream_goes_on_from_any_batch(folder):
    stream = data.load(folder, stream=True, stream_workers=0)
    assert_same(training(stream, first_batch=8), _From(training(data.load(folder)), 8), range(5))


@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_batches_hold_what_the_whole_ones_do(folder, stream):
    dataset = data.load(folder, stream=stream, stream_workers=1)
    parts = {4: slice(1, 3), 1: slice(0, 1)}
    for batches, count in ((training(dataset, first_batch=2), 8), (evaluation(dataset), 3)):
        some = batches.part(parts)
        for index in range(count):
            size = some.size(index)
            assert size == batches.size(index) == len(batches[index][1])
            for part, whole in zip(some[index], batches[index], strict=True):
                np.testing.assert_array_equal(part, whole[parts[size]])


class _From:
    def __init__(self, batches, first):
        self.batches, self.first = batches, first

    def __getitem__(self, index):
        return self.batches[self.first + index]


def test_parts_of_a_stream_are_those_of_the_images_in_memory(folder):
    settings = {"image_size": 8, "train_examples": 15, "validation_fraction": 0.4}
    memory = data.load(folder, **settings)
    stream = data.load(folder, stream=True, stream_workers=1, **settings)
    for part in ("train", "test", "validation"):
        images = getattr(stream, f"x_{part}")
        assert images.workers == 1
        np.testing.assert_array_equal(images[:], getattr(memory, f"x_{part}"))
        np.testing.assert_array_equal(getattr(stream, f"y_{part}"), getattr(memory, f"y_{part}"))
    without_test = data.load(folder / "train", stream=True)
    expected = data.load(folder / "train")
    np.testing.assert_array_equal(without_test.x_test[:], expected.x_test)


def test_the_model_trains_on_a_stream_as_on_the_images_in_memory(folder):
    def history(dataset):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01), loss)
        batches = training(dataset)
        fitted = model.fit(
            batches, steps_per_epoch=batches.steps_per_epoch, epochs=2, shuffle=False,
            validation_data=evaluation(dataset), verbose=0,
        )  # fmt: skip
        return fitted.history

    stream = data.load(folder, stream=True, stream_workers=1)
    assert history(stream) == history(data.load(folder))


def test_the_fingerprint_of_a_stream(folder, tmp_path):
    def fingerprint(path=folder, **settings):
        return data.load(path, stream=True, **settings).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(image_size=8) != first
    assert fingerprint(train_examples=12) != first
    save_noise(tmp_path / "train" / "a", 7)
    save_noise(tmp_path / "train" / "b", 8)
    save_noise(tmp_path / "test" / "a", 1)
    before = fingerprint(tmp_path)
    (tmp_path / "train" / "a" / "00.png").rename(tmp_path / "train" / "a" / "70.png")
    assert fingerprint(tmp_path) != before


def test_views_of_a_stream_are_those_of_the_images_in_memory(folder):
    memory, stream = data.load(folder), data.load(folder, stream=True)
    for augmentation in ("crop_flip", "resized_crop_flip"):
        arguments = (2, augmentation, memory.mean, memory.std)
        expected = data.FixedViews(memory.x_train, *arguments)
        views = data.FixedViews(stream.x_train, *arguments)
        for chosen in (np.arange(21), np.array([20, 3, 3])):
            np.testing.assert_array_equal(views(1, chosen), expected(1, chosen))


# What it is made of


def test_windows_are_those_of_the_originals_and_not_of_resized_images(tmp_path):
    save_noise(tmp_path / "train" / "a", 3, (40, 64))
    save_noise(tmp_path / "train" / "b", 3, (20, 30))
    save_noise(tmp_path / "test" / "a", 1)
    stream = data.load(tmp_path, image_size=16, stream=True, stream_workers=0)
    seed, mean, std = 5, (0.0,) * 3, (1.0,) * 3
    batches = data.TrainingBatches(
        stream.x_train, stream.y_train, 6, seed, mean, std, "resized_crop_flip"
    )
    x, _ = batches[0]
    files = sorted((tmp_path / "train").glob("*/*.png"))
    order = np.random.default_rng([seed, 0, 0]).permutation(6)
    # The draws are the plan's; what is cut out of which image is worked out anew.
    rng = np.random.default_rng([seed, 0, 1])
    draws, flips = rng.random((4, 10, 6), np.float32), rng.random(6) < 0.5
    for place, index in enumerate(order):
        image = Image.open(files[index])
        box = _first_window_that_fits(image.height, image.width, draws[:, :, place])
        cut = image.crop(box).resize((16, 16), Image.Resampling.BILINEAR)
        found = np.rint(255 * x[place]).astype(np.uint8)
        found = found[:, ::-1] if flips[place] else found
        if keras.config.image_data_format() == "channels_last":
            np.testing.assert_array_equal(found, cut)


def _first_window_that_fits(height, width, draws):
    for area, aspect, across, down in draws.T.astype(float):
        area = height * width * (0.08 + 0.92 * area)
        aspect = (3 / 4) * (16 / 9) ** aspect
        wide, tall = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(across * (width - wide + 1)), int(down * (height - tall + 1))
            return left, top, left + wide, top + tall
    raise AssertionError("none fits")


def test_windows_lie_within_the_image_and_have_the_areas_and_aspects_that_they_should():
    draws = np.random.default_rng(0).random((4, 10, 2000), np.float32)
    windows = [pixels._window((60, 60, 3), draws[:, :, k]) for k in range(2000)]
    top, bottom = np.array([(rows.start, rows.stop) for rows, _ in windows]).T
    left, right = np.array([(columns.start, columns.stop) for _, columns in windows]).T
    assert left.min() == 0 and top.min() == 0
    assert right.max() == bottom.max() == 60
    areas, aspects = (right - left) * (bottom - top) / 3600, (right - left) / (bottom - top)
    assert 0.07 < areas.min() < 0.1 and 0.9 < areas.max() <= 1
    assert 0.7 < aspects.min() < 0.78 and 1.28 < aspects.max() < 1.42


def test_where_no_window_fits_the_largest_one_in_the_middle_is_taken():
    nearly_all = np.full((4, 10), 0.999)
    assert pixels._window((10, 100, 3), nearly_all) == (slice(0, 10), slice(43, 56))
    assert pixels._window((100, 10, 3), nearly_all) == (slice(43, 56), slice(0, 10))
    assert pixels._window((1, 1, 3), nearly_all) == (slice(0, 1), slice(0, 1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_channel_is_resized_alike(channels):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, channels), dtype=np.uint8)
    resized = pixels.resize(image, (5, 6))
    assert resized.shape == (5, 6, channels)
    for channel in range(channels):
        expected = Image.fromarray(image[..., channel]).resize((6, 5), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(resized[..., channel], expected)


def test_an_augmentation_does_the_same_for_all_or_for_some():
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    for name in data.AUGMENTATIONS:
        augment = Augmentation(name, 9, np.random.default_rng(1))
        every = augment(images, np.arange(9), (8, 8))
        some = np.array([7, 2])
        np.testing.assert_array_equal(augment(images[some], some, (8, 8)), every[some])


def test_photographs_are_cut_and_small_images_are_not(tmp_path):
    for size, expected in ((128, "resized_crop_flip"), (127, "crop_flip")):
        save_noise(tmp_path / str(size) / "a", 3, (size, 140))
        save_noise(tmp_path / str(size) / "b", 3, (size, 140))
        assert data.load(tmp_path / str(size)).augmentation == expected
        assert data.load(tmp_path / str(size), stream=True).augmentation == expected


# What goes wrong


def test_sets_in_memory_are_no_streams(tmp_path):
    with pytest.raises(InputError, match=r"^stream: True, but digits is read into memory"):
        data.load("digits", stream=True)
    assert isinstance(data.load("digits", stream=None).x_train, np.ndarray)


@pytest.mark.parametrize("stream", [False, True])
def test_images_of_several_sizes_are_refused_before_any_is_trained_on(tmp_path, stream):
    save_noise(tmp_path / "a", 3)
    save_noise(tmp_path / "b", 3, (9, 9))
    with pytest.raises(InputError, match=r"differ in size: .*10×12 .*9×9; .*--image_size"):
        data.load(tmp_path, stream=stream)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(folder, tmp_path, workers):
    save_noise(tmp_path / "train" / "a", 4)
    save_noise(tmp_path / "train" / "b", 4)
    save_noise(tmp_path / "test" / "a", 1)
    damaged = tmp_path / "train" / "b" / "02.png"
    stream = data.load(tmp_path, stream=True, stream_workers=workers)
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    batches = training(stream, batch_size=8)
    with pytest.raises(InputError, match=r"b/02.png can't be read as an image"):
        batches[0]
    # Mended, it goes on.
    damaged.write_bytes(content)
    assert_same(batches, training(data.load(tmp_path), batch_size=8), [0])
    batches.close()


@pytest.mark.parametrize("noticed", ["by its batch", "by the next submission"])
def test_a_decoding_process_that_is_killed_ends_the_training_in_one_line(folder, noticed):
    stream = data.load(folder, stream=True, stream_workers=1)
    batches = training(stream)
    batches[0]
    (process,) = batches._made._makers._processes.values()
    os.kill(process.pid, signal.SIGKILL)
    if noticed == "by the next submission":
        # The pool knows of it before it is asked for another batch.
        batches._made._makers._executor_manager_thread.join()
    with pytest.raises(TrainingError, match=r"^stream: a process .* has ended\..*stream_workers"):
        for index in range(1, 9):
            batches[index]


@pytest.mark.once
def test_the_decoding_processes_end_with_a_process_that_is_killed(folder):
    script = (
        "import os, sys, time\n"
        "from dskd_keras import data\n"
        "if __name__ == '__main__':\n"
        "    d = data.load(sys.argv[1], stream=True, stream_workers=2)\n"
        "    b = data.TrainingBatches(d.x_train, d.y_train, 4, 0, d.mean, d.std)\n"
        "    b[0]\n"
        "    print(*b._made._makers._processes, flush=True)\n"
        "    time.sleep(600)\n"
    )
    path = folder.parent / "killed.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, path, folder], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        workers = [int(number) for number in process.stdout.readline().split()]
        assert len(workers) == 2 and all(map(_is_running, workers))
        process.kill()
    deadline = time.monotonic() + 30
    while any(map(_is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_is_running, workers))


def _is_running(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.once
def test_threads_that_make_batches_may_be_the_last_to_let_go_of_them():
    threads = ThreadPoolExecutor(1)
    assert threads.submit(prefetching._shut_down, threads).result() is None
    with pytest.raises(RuntimeError, match="after shutdown"):
        threads.submit(print)


@pytest.mark.once
def test_decoding_processes_import_no_keras(folder):
    stream = data.load(folder, stream=True)
    script = (
        "import os, pickle, sys\n"
        "os.environ['DSKD_KERAS_DEFER'] = '1'\n"
        "plan = pickle.loads(sys.stdin.buffer.read())\n"
        "plan.pixels(0)\n"
        "assert not {'keras', 'torch', 'tensorflow', 'jax'} & {*sys.modules}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(training(stream).plan),
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


# When one is taken


def test_a_stream_is_taken_where_images_need_more_than_a_quarter_of_the_memory(folder, monkeypatch):
    size = 30 * 12 * 10 * 3
    monkeypatch.setattr(streams, "memory_bytes", lambda: 4 * size)
    assert isinstance(data.load(folder, stream=None).x_train, np.ndarray)
    monkeypatch.setattr(streams, "memory_bytes", lambda: 4 * size - 1)
    taken = data.load(folder, stream=None)
    assert isinstance(taken.x_train, data.ImageStream)
    assert "--stream false" in taken.notes[-1]
    assert isinstance(data.load(folder, stream=False).x_train, np.ndarray)
    # The wish says it; a note would repeat it.
    assert not data.load(folder, stream=True).notes


def test_the_memory_of_this_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < streams.memory_bytes() <= total


# A set of TensorFlow Datasets; more of them in test_data_tfds.py


def test_a_stream_of_tiny_imagenet(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    if not SAMPLE.exists():
        pytest.skip("needs the sample of Tiny ImageNet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    local = tmp_path / "tiny-imagenet-200.zip"
    local.symlink_to(SAMPLE)
    stream = data.load("tiny_imagenet", data_dir=local, stream=True, stream_workers=0)
    memory = data.load("tiny_imagenet", data_dir=local)
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(stream, f"y_{part}"), getattr(memory, f"y_{part}"))
        images, expected = getattr(stream, f"x_{part}"), getattr(memory, f"x_{part}")
        assert images.shape == expected.shape
        # JPEGs: Pillow's decoder and TensorFlow's round differently.
        difference = images[:50].astype(int) - expected[:50].astype(int)
        assert np.abs(difference).mean() < 1
    assert stream.notes[0] == memory.notes[0]
