"""Many images: where arrays live, how they are divided, and what their channels average to."""

import math
import shutil
import tempfile
import threading
from collections.abc import Sequence

import numpy as np

from dskd_keras.data import pixels
from dskd_keras.data.plans import Images
from dskd_keras.data.reading import in_threads, needed
from dskd_keras.data.streams import ImageStream
from dskd_keras.errors import InputError

# Every split is made with this seed and not with a run's: a teacher and all seeds of its students
# must be trained and tested on the same images.
SPLIT_SEED = 0
HELD_OUT = 0.2
IN_MEMORY_BYTES = 4 * 2**30
_CHUNK_BYTES = 64 * 2**20
# Of a stream so many images give the mean and the deviation of its channels.
SAMPLED = 10_000
_IMAGES_A_TASK = 64


def allocate_images(shape: Sequence[int]) -> np.ndarray:
    """Returns zeros, uint8 `[N, H, W, C]`, on disk where they would take more than 4 GiB of memory.

    The temporary file behind a large array has no name any more, so it disappears with the array,
    even where the process is killed. Raises `InputError` where there is no room for it.
    """
    size = math.prod(shape)
    if size <= IN_MEMORY_BYTES:
        return np.zeros(shape, np.uint8)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    # The file is sparse: without this check a full disk kills the process when a page is written.
    if size > free:
        raise InputError(
            f"dataset: its images take {size / 2**30:.1f} GiB and the temporary folder {folder} has"
            f" {free / 2**30:.1f} GiB free; set TMPDIR to a larger one or use a smaller image_size."
        )
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=tuple(shape)).view(np.ndarray)


def take(images: Images, indices: np.ndarray) -> Images:
    """Returns a copy of `images[indices]`, on disk where it is large; of a stream, a stream."""
    if isinstance(images, ImageStream):
        return images.subset(indices)
    taken = allocate_images((len(indices), *images.shape[1:]))
    for part in chunks(taken):
        taken[part] = images[indices[part]]
    return taken


def divide(images: Images, count: int) -> tuple[Images, Images]:
    """Returns the first `count` images and the others, without copying any."""
    if isinstance(images, ImageStream):
        return images.subset(np.arange(count)), images.subset(np.arange(count, len(images)))
    return images[:count], images[count:]


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Returns uint8 `[N, size, size, C]`, bilinear and antialiased, with Pillow."""
    if images.shape[1:3] == (size, size):
        return images
    resized = allocate_images((len(images), size, size, images.shape[3]))

    def resize_one(index: int) -> None:
        resized[index] = pixels.resize(images[index], (size, size))

    in_threads(resize_one, range(len(images)))
    return resized


def stratified_split(labels: np.ndarray, count: int, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Divides the indices of `labels`, int `[N]`, into `N - count` and `count`, both sorted.

    Both parts have the same mix of classes, and every call gives the same. A class of a single
    image stays in the first. Where `count` is smaller than the number of classes the choice is
    random, since there is no mix to keep. Raises `InputError` about `field` where the first part
    would lack a class.
    """
    train_test_split = needed("sklearn.model_selection", "scikit-learn").train_test_split
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    divisible = np.flatnonzero(sizes[inverse] > 1)
    num_classes = int(np.count_nonzero(sizes > 1))
    most = len(divisible) - num_classes
    if not 1 <= count <= most:
        raise InputError(
            f"{field}: can't set {count} of {len(labels)} images of {len(sizes)} classes apart;"
            f" between 1 and {most} images leave one image a class."
        )
    _, chosen = train_test_split(
        divisible,
        test_size=count,
        random_state=SPLIT_SEED,
        stratify=labels[divisible] if count >= num_classes else None,
    )
    chosen = np.sort(chosen)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def hold_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Sets 20 % of the images, and at least one a class, apart as a test set.

    Returns the sorted indices of both parts, and the sentence that tells the user.
    """
    count = max(round(HELD_OUT * len(labels)), len(np.unique(labels)))
    train, test = stratified_split(labels, count, "dataset")
    note = f"no test split: {len(test)} of {len(labels)} images are held out as the test set"
    return train, test, note


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns each channel's mean and standard deviation, of pixels in [0, 1].

    Counts how often each of the 256 values occurs and sums in integers: this needs no float copy
    of the images, and the result, which enters a teacher's fingerprint, is the same on every
    machine. The deviation of a constant channel is given as 1: dividing by it leaves zeros.

    Of a stream of more than 10,000 images so many are counted, at even distances.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    lock = threading.Lock()

    def count(some: np.ndarray) -> None:
        for channel, values in enumerate(some.reshape(-1, channels).T):
            found = np.bincount(values, minlength=256)
            with lock:
                counts[channel] += found

    if isinstance(images, ImageStream):
        sample = np.linspace(0, len(images) - 1, min(len(images), SAMPLED)).astype(int)
        parts = range(0, len(sample), _IMAGES_A_TASK)
        in_threads(lambda start: count(images[sample[start : start + _IMAGES_A_TASK]]), parts)
    else:
        for part in chunks(images):
            count(images[part])
    # Python's integers: the squares of the sums don't fit in 64 bits.
    exact, values = counts.astype(object), np.arange(256).astype(object)
    number, total, squares = exact.sum(axis=1), exact @ values, exact @ values**2
    variances = (number * squares - total**2) / (255 * number) ** 2
    return tuple(total / (255 * number)), tuple(math.sqrt(each) or 1.0 for each in variances)


def chunks(images: np.ndarray) -> list[slice]:
    """Returns slices that divide `[N, H, W, C]` into parts of at most 64 MiB (or one image)."""
    step = max(1, _CHUNK_BYTES // max(1, math.prod(images.shape[1:])))
    return [slice(start, start + step) for start in range(0, len(images), step)]
