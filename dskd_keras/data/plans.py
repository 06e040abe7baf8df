"""Which images a batch holds and what happens to them: pure functions of its index. Without Keras.

So the same batches can be made in this process and in others.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dskd_keras.data.pixels import Augmentation, normalize
from dskd_keras.data.streams import ImageStream

Images = np.ndarray | ImageStream
Batch = tuple[np.ndarray, np.ndarray]
_Floats = Sequence[float]


@dataclasses.dataclass(frozen=True)
class ToInput:
    """Normalises images and brings them into Keras's image data format."""

    mean: _Floats
    std: _Floats
    channels_first: bool

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns float32 of uint8 `[B, H, W, C]`: the same shape, or `[B, C, H, W]`."""
        x = normalize(images, self.mean, self.std)
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if self.channels_first else x


@dataclasses.dataclass(frozen=True)
class Plan(abc.ABC):
    """What all batches are made of."""

    images: Images
    labels: np.ndarray
    batch_size: int
    to_input: ToInput
    # Which rows of a batch are made, by its size: all, or what the devices of this process need.
    parts: Mapping[int, slice]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold each image once, the smaller last one included."""
        return math.ceil(len(self.images) / self.batch_size)

    def size(self, index: int) -> int:
        """Returns how many images batch `index` has, all parts of it together."""
        start = (index % self.steps_per_epoch) * self.batch_size
        return min(self.batch_size, len(self.images) - start)

    def rows(self, size: int) -> slice:
        """Returns which rows of a batch of a size are made."""
        return self.parts.get(size, slice(None))

    @abc.abstractmethod
    def pixels(self, index: int) -> Batch:
        """Returns the images of batch `index`, uint8 `[B, H, W, C]`, and their labels `[B]`."""

    def __call__(self, index: int) -> Batch:
        """Returns batch `index`: float32 inputs, and labels `[B]`."""
        images, labels = self.pixels(index)
        return self.to_input(images), labels


@dataclasses.dataclass(frozen=True)
class TrainingPlan(Plan):
    """Shuffled and augmented batches without end."""

    seed: int
    augmentation: str
    first_batch: int

    def pixels(self, index: int) -> Batch:
        """Returns batch `index`, counted from `first_batch`."""
        chosen, augmentation, rows = self._drawn(index)
        images = augmented(self.images, chosen, augmentation, rows)
        return images, self.labels[chosen]

    def moves(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns what batch `index` is made by, where that is done elsewhere, and its labels.

        The dict holds `images`, their indices, int32 `[B]`, and what `Augmentation.moves` returns:
        `corners`, int32 `[B, 2]`, and `flipped`, as 0 or 1, uint8 `[B]`: numbers all, since Keras
        takes means over the replicas of `tf.distribute`.
        """
        chosen, augmentation, rows = self._drawn(index)
        corners, flipped = augmentation.moves(rows)
        made_by = {
            "images": chosen.astype(np.int32),
            "corners": corners,
            "flipped": flipped.astype(np.uint8),
        }
        return made_by, self.labels[chosen]

    def _drawn(self, index: int) -> tuple[np.ndarray, Augmentation, np.ndarray]:
        """Returns the images of batch `index`, and an augmentation with which draws are theirs."""
        epoch, step, chosen = self.place(index)
        rng = np.random.default_rng([self.seed, epoch, step + 1])
        # Drawn for the whole batch: a part sees what the whole would have.
        augmentation = Augmentation(self.augmentation, len(chosen), rng)
        rows = np.arange(len(chosen))[self.rows(len(chosen))]
        return chosen[rows], augmentation, rows

    def size(self, index: int) -> int:
        """Returns how many images batch `index` has, counted from `first_batch`."""
        return super().size(self.first_batch + index)

    def place(self, index: int) -> tuple[int, int, np.ndarray]:
        """Returns the epoch and the step of batch `index`, and its images' indices `[B]`."""
        epoch, step = divmod(self.first_batch + index, self.steps_per_epoch)
        start = step * self.batch_size
        order = _permutation(self.seed, epoch, len(self.images))
        return epoch, step, order[start : start + self.batch_size]


@dataclasses.dataclass(frozen=True)
class EvaluationPlan(Plan):
    """Batches in order, each image once and as it is."""

    def pixels(self, index: int) -> Batch:
        """Returns batch `index` of one pass."""
        size = self.size(index)
        chosen = index * self.batch_size + np.arange(size)[self.rows(size)]
        return self.images[chosen], self.labels[chosen]


# Several threads may be in two epochs, of a training run or two.
@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0]).permutation(count)


def augmented(
    images: Images, chosen: np.ndarray, augmentation: Augmentation, drawn: np.ndarray
) -> np.ndarray:
    """Returns chosen images `[B]` as an augmentation has `drawn` `[B]` for them.

    Returns uint8 `[B, H, W, C]`.
    """
    height, width = images.shape[1:3]
    if augmentation.takes_originals and isinstance(images, ImageStream):
        return augmentation(images.originals(chosen), drawn, (height, width))
    return augmentation(images[chosen], drawn, (height, width))
