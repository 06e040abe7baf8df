"""Batches for training, augmented anew each epoch, and for evaluation."""

import math
from collections.abc import Sequence

import keras
import numpy as np

from dskd_keras import checks
from dskd_keras.data.dataset import check_arrays, check_augmentation

PADDING = 4
# Which of the images: indices `[B]`, or a part of them in order.
_Chosen = np.ndarray | slice
_Floats = Sequence[float]


def normalize(images: np.ndarray, mean: _Floats, std: _Floats) -> np.ndarray:
    """Returns `(images / 255 - mean) / std`.

    Args:
        images: uint8 `[..., H, W, C]`.
        mean: C floats, of pixels in [0, 1].
        std: C floats, of pixels in [0, 1].

    Returns:
        float32 of the shape of `images`.
    """
    deviation = np.asarray(std, np.float64)
    scale = 1 / (255 * deviation)
    offset = -np.asarray(mean, np.float64) / deviation
    # A whole image row at once: NumPy's broadcast over three channels takes many times as long.
    width = images.shape[-2]
    rows = images.reshape(*images.shape[:-2], -1).astype(np.float32)
    rows *= np.tile(scale, width).astype(np.float32)
    rows += np.tile(offset, width).astype(np.float32)
    return rows.reshape(images.shape)


class _Augmentation:
    """Crops and mirrorings of `count` images, drawn at random."""

    def __init__(self, name: str, count: int, rng: np.random.Generator) -> None:
        check_augmentation(name)
        self._corners: np.ndarray | None = None
        self._flipped: np.ndarray | None = None
        if name != "none":
            # As bytes: the fixed views of a whole data set are kept.
            self._corners = rng.integers(0, 2 * PADDING + 1, size=(2, count)).astype(np.uint8)
        if name == "crop_flip":
            self._flipped = rng.random(count) < 0.5

    def __call__(self, images: np.ndarray, chosen: _Chosen = slice(None)) -> np.ndarray:
        """Returns `images`, uint8 `[B, H, W, C]`, as drawn for the `chosen` ones."""
        if self._corners is not None:
            images = _crop(images, *self._corners[:, chosen].astype(np.intp))
        if self._flipped is not None:
            # Pixels as single items: reversing an axis of three-byte rows takes twice as long.
            pixels = images.view(f"V{images.shape[-1]}")[..., 0]
            flipped = self._flipped[chosen]
            pixels[flipped] = pixels[flipped, :, ::-1]
        return images


def _crop(images: np.ndarray, top: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Pads each image with 4 black pixels on every side and cuts a window out.

    The windows' first rows and columns are integers from 0 to 8, `[B]`.
    """
    batch, height, width, channels = images.shape
    padded = np.zeros((batch, height + 2 * PADDING, (width + 2 * PADDING) * channels), images.dtype)
    padded[:, PADDING : PADDING + height, PADDING * channels : (PADDING + width) * channels] = (
        images.reshape(batch, height, -1)
    )
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (height, width * channels), axis=(1, 2)
    )
    return windows[np.arange(batch), top, left * channels].reshape(images.shape)


def _to_input(images: np.ndarray, mean: _Floats, std: _Floats) -> np.ndarray:
    """Returns normalised images in Keras's image data format."""
    x = normalize(images, mean, std)
    if keras.config.image_data_format() == "channels_first":
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x


class FixedViews:
    """A fixed number of augmented views of each image: what a teacher can be shown beforehand.

    View k of image i is the same in every process and for every seed of a run.

    Args:
        images: uint8 `[N, H, W, C]`.
        count: Number of views, K.
        augmentation: As in `TrainingBatches`.
        mean: C floats, of pixels in [0, 1].
        std: C floats, of pixels in [0, 1].
    """

    def __init__(
        self, images: np.ndarray, count: int, augmentation: str, mean: _Floats, std: _Floats
    ) -> None:
        self.images = images
        self.count = count
        self._normalization = (mean, std)
        self._views = [
            _Augmentation(augmentation, len(images), np.random.default_rng(view))
            for view in range(count)
        ]

    def __call__(self, view: int, chosen: np.ndarray) -> np.ndarray:
        """Returns views of some images.

        Args:
            view: Integer in [0, K).
            chosen: Indices of images, `[B]`.

        Returns:
            float32 `[B, H, W, C]`, or `[B, C, H, W]` where Keras's image data format is
            `"channels_first"`.
        """
        return _to_input(self._views[view](self.images[chosen], chosen), *self._normalization)


class _Batches(keras.utils.PyDataset):
    """Normalised images and their labels, in batches."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, batch_size: int, mean: _Floats, std: _Floats
    ) -> None:
        super().__init__(workers=1)
        check_arrays("images", images, "labels", labels)
        self.images = images
        self.labels = labels.astype(np.int32)
        self.batch_size = checks.whole("batch_size", batch_size, 1)
        self.mean = mean
        self.std = std

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold each image once, the smaller last one included."""
        return math.ceil(len(self.images) / self.batch_size)


class TrainingBatches(_Batches):
    """Shuffled and augmented batches without end, each a pure function of its place.

    Keras calls `on_epoch_begin` a different number of times on each backend, and fetches batches of
    the next epoch before this one ends. So nothing here counts: batch `index` belongs to epoch
    `(first_batch + index) // steps_per_epoch`, and its images, crops and flips follow from the
    seed, the epoch and the step alone. A run that is resumed with `first_batch` sees what the
    uninterrupted run would have seen. Use it as

    ```python
    batches = TrainingBatches(x, y, batch_size=64, seed=0, mean=mean, std=std)
    model.fit(batches, steps_per_epoch=batches.steps_per_epoch, epochs=240, shuffle=False)
    ```

    Each epoch visits every image once; its last batch is smaller where the batch size doesn't
    divide the number of images.

    There is no `workers` to set: with more than one, Keras's queue goes on counting after the batch
    by which it builds a model on JAX and PyTorch, and training starts at the second batch.

    Args:
        images: uint8 `[N, H, W, C]`.
        labels: int `[N]`.
        batch_size: Images a batch.
        seed: Non-negative integer.
        mean: C floats, of pixels in [0, 1].
        std: C floats, of pixels in [0, 1].
        augmentation: `"crop_flip"` (each image is padded with 4 black pixels, cropped and mirrored
            at random, as is usual for CIFAR), `"crop"` or `"none"`. Defaults to `"crop_flip"`.
        first_batch: Batches of the training that were done before. Defaults to 0.

    Raises:
        InputError: An argument is out of its range.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        mean: _Floats,
        std: _Floats,
        augmentation: str = "crop_flip",
        first_batch: int = 0,
    ) -> None:
        super().__init__(images, labels, batch_size, mean, std)
        check_augmentation(augmentation)
        self.seed = checks.whole("seed", seed, 0)
        self.augmentation = augmentation
        self.first_batch = checks.whole("first_batch", first_batch, 0)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    @property
    def num_batches(self) -> None:
        """`None`: Keras then reads on from epoch to epoch instead of starting again at batch 0."""
        return None

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns batch `index`, counted from `first_batch`.

        Args:
            index: Non-negative integer.

        Returns:
            `(x, y)`: float32 `[B, H, W, C]`, or `[B, C, H, W]` where Keras's image data format is
            `"channels_first"`, and int32 `[B]`.
        """
        epoch, step, chosen = self.place(index)
        rng = np.random.default_rng([self.seed, epoch, step + 1])
        images = _Augmentation(self.augmentation, len(chosen), rng)(self.images[chosen])
        return _to_input(images, self.mean, self.std), self.labels[chosen]

    def place(self, index: int) -> tuple[int, int, np.ndarray]:
        """Returns the epoch and the step of batch `index`, and its images' indices `[B]`."""
        epoch, step = divmod(self.first_batch + index, self.steps_per_epoch)
        start = step * self.batch_size
        return epoch, step, self._permutation(epoch)[start : start + self.batch_size]

    def _permutation(self, epoch: int) -> np.ndarray:
        # One tuple, read once and replaced whole: several threads may be here, in two epochs.
        known, order = self._order
        if known != epoch:
            order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.images))
            self._order = (epoch, order)
        return order


class EvaluationBatches(_Batches):
    """Batches in order, each image once and as it is.

    Args:
        images: uint8 `[N, H, W, C]`.
        labels: int `[N]`.
        batch_size: Images a batch; the last one may be smaller.
        mean: C floats, of pixels in [0, 1].
        std: C floats, of pixels in [0, 1].

    Raises:
        InputError: An argument is out of its range.
    """

    @property
    def num_batches(self) -> int:
        """Batches in one pass, the smaller last one included."""
        return self.steps_per_epoch

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns batch `index` of one pass.

        Args:
            index: Integer in `[0, num_batches)`.

        Returns:
            `(x, y)` as `TrainingBatches` gives them.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches}")
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return _to_input(self.images[part], self.mean, self.std), self.labels[part]
