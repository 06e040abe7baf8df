"""What happens to single images: normalised, resized, and augmented at random. Without Keras."""

from collections.abc import Sequence

import numpy as np

from dskd_keras.data.reading import needed
from dskd_keras.errors import InputError, unknown_name

AUGMENTATIONS = ("crop_flip", "crop", "resized_crop_flip", "none")
PADDING = 4
# Of a window that is cut out and resized: its share of the image's area, its width over its height,
# and how often one that fits is looked for. Szegedy et al., "Going deeper with convolutions", 2015.
_AREAS = (0.08, 1.0)
_ASPECTS = (3 / 4, 4 / 3)
_ATTEMPTS = 10
_Floats = Sequence[float]


def check_augmentation(name: str) -> None:
    """Raises `InputError` unless `name` is one of `AUGMENTATIONS`."""
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)


def normalize(images: np.ndarray, mean: _Floats, std: _Floats) -> np.ndarray:
    """Returns `(images / 255 - mean) / std`.

    Args:
        images: uint8 `[..., H, W, C]`.
        mean: C floats, of pixels in [0, 1].
        std: C floats, of pixels in [0, 1].

    Returns:
        float32 of the shape of `images`.

    Raises:
        InputError: `images` is no array.
    """
    if not isinstance(images, np.ndarray):
        raise InputError(
            f"images: a {type(images).__name__}, but an array is needed. A stream is read by "
            "TrainingBatches and EvaluationBatches, which normalise."
        )
    deviation = np.asarray(std, np.float64)
    scale = 1 / (255 * deviation)
    offset = -np.asarray(mean, np.float64) / deviation
    # A whole image row at once: NumPy's broadcast over three channels takes many times as long.
    width = images.shape[-2]
    rows = images.reshape(*images.shape[:-2], -1).astype(np.float32)
    rows *= np.tile(scale, width).astype(np.float32)
    rows += np.tile(offset, width).astype(np.float32)
    return rows.reshape(images.shape)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns an image in another size: bilinear and antialiased, by Pillow.

    Args:
        image: uint8 `[H, W, C]`.
        size: Height and width of what is returned.

    Returns:
        uint8 `[*size, C]`.
    """
    if image.shape[:2] == size:
        return image
    pillow = needed("PIL.Image", "pillow")
    # Pillow weighs the colours of a fourth channel's pixels by it, and knows no other number.
    parts = [image] if image.shape[2] == 3 else np.moveaxis(image, 2, 0)
    resized = [
        np.asarray(
            pillow.fromarray(np.ascontiguousarray(part)).resize(
                size[::-1], pillow.Resampling.BILINEAR
            )
        )
        for part in parts
    ]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=2)


class Augmentation:
    """What happens to each of `count` images, drawn at random.

    Args:
        name: One of `AUGMENTATIONS`.
        count: Number of images, N.
        rng: Used up here: every call does the same.
    """

    def __init__(self, name: str, count: int, rng: np.random.Generator) -> None:
        check_augmentation(name)
        self._corners: np.ndarray | None = None
        self._windows: np.ndarray | None = None
        self._flipped: np.ndarray | None = None
        if name in ("crop_flip", "crop"):
            # As bytes: the fixed views of a whole data set are kept.
            self._corners = rng.integers(0, 2 * PADDING + 1, size=(2, count)).astype(np.uint8)
        if name == "resized_crop_flip":
            self._windows = rng.random((4, _ATTEMPTS, count), np.float32)
        if name.endswith("flip"):
            self._flipped = rng.random(count) < 0.5

    @property
    def takes_originals(self) -> bool:
        """Whether the images are wanted as they are stored: as large, and of any size."""
        return self._windows is not None

    def moves(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns how images of one size are moved and mirrored, where nothing else is done.

        Args:
            drawn: Which of the N draws are for them, int `[B]`.

        Returns:
            `(corners, flipped)`: the row and the column of each image at which what is returned of
            it begins, int32 `[B, 2]`, negative in the padding; and whether that is mirrored, bool
            `[B]`.
        """
        corners = np.zeros((len(drawn), 2), np.int32)
        if self._corners is not None:
            corners = self._corners[:, drawn].T.astype(np.int32) - PADDING
        flipped = np.zeros(len(drawn), bool) if self._flipped is None else self._flipped[drawn]
        return corners, flipped

    def __call__(
        self, images: Sequence[np.ndarray] | np.ndarray, drawn: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        """Returns images as drawn for them.

        Args:
            images: uint8 `[B, H, W, C]`; where originals are taken, B images `[*, *, C]`.
            drawn: Which of the N draws are for them, int `[B]`.
            size: H and W of what is returned.

        Returns:
            uint8 `[B, H, W, C]`.
        """
        if self._windows is not None:
            windows = self._windows[:, :, drawn]
            images = np.stack(
                [
                    resize(image[_window(image.shape, windows[:, :, index])], size)
                    for index, image in enumerate(images)
                ]
            )
        images = np.asarray(images)
        if self._corners is not None:
            images = _crop(images, *self._corners[:, drawn].astype(np.intp))
        if self._flipped is not None:
            # Pixels as single items: reversing an axis of three-byte rows takes twice as long.
            pixels = images.view(f"V{images.shape[-1]}")[..., 0]
            flipped = self._flipped[drawn]
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


def _window(shape: Sequence[int], draws: np.ndarray) -> tuple[slice, slice]:
    """Returns the rows and the columns of a window of an image of a shape `(H, W, C)`.

    Its area and its aspect are even in their ranges, the aspect on a logarithmic scale. Where none
    of the drawn ones, `[4, 10]` in [0, 1), fits into the image, it is the largest one in the middle
    whose aspect is in its range.
    """
    height, width = shape[:2]
    low, high = np.log(_ASPECTS)
    areas = height * width * (_AREAS[0] + (_AREAS[1] - _AREAS[0]) * draws[0])
    aspects = np.exp(low + (high - low) * draws[1])
    widths = np.rint(np.sqrt(areas * aspects)).astype(int)
    heights = np.rint(np.sqrt(areas / aspects)).astype(int)
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if fits.any():
        first = int(np.argmax(fits))
        wide, tall = int(widths[first]), int(heights[first])
        left = int(draws[2, first] * (width - wide + 1))
        top = int(draws[3, first] * (height - tall + 1))
        return slice(top, top + tall), slice(left, left + wide)
    wide = min(width, max(1, round(height * _ASPECTS[1])))
    tall = min(height, max(1, round(width / _ASPECTS[0])))
    left, top = (width - wide) // 2, (height - tall) // 2
    return slice(top, top + tall), slice(left, left + wide)
