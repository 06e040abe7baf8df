"""Batches for training, augmented anew each epoch, and for evaluation."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import keras
import numpy as np

from dskd_keras import checks
from dskd_keras.data.dataset import check_arrays
from dskd_keras.data.pixels import Augmentation, check_augmentation
from dskd_keras.data.plans import (
    Batch,
    EvaluationPlan,
    Images,
    Plan,
    ToInput,
    TrainingPlan,
    augmented,
)
from dskd_keras.data.prefetching import Prefetched
from dskd_keras.data.streams import ImageStream

# What a thread decodes at a time.
_IMAGES_A_TASK = 64
_Floats = Sequence[float]


def _to_input(mean: _Floats, std: _Floats) -> ToInput:
    return ToInput(mean, std, keras.config.image_data_format() == "channels_first")


class FixedViews:
    """A fixed number of augmented views of each image: what a teacher can be shown beforehand.

    View k of image i is the same in every process and for every seed of a run.

    Args:
        images: uint8 `[N, H, W, C]`, or an `ImageStream`.
        count: Number of views, K.
        augmentation: As in `TrainingBatches`.
        mean: C floats, of pixels in [0, 1].
        std: C floats, of pixels in [0, 1].
    """

    def __init__(
        self, images: Images, count: int, augmentation: str, mean: _Floats, std: _Floats
    ) -> None:
        self.images = images
        self.count = count
        self._to_input = _to_input(mean, std)
        self._views = [
            Augmentation(augmentation, len(images), np.random.default_rng(view))
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
        augmentation = self._views[view]
        if not isinstance(self.images, ImageStream):
            return self._to_input(augmented(self.images, chosen, augmentation, chosen))
        parts = [
            chosen[start : start + _IMAGES_A_TASK]
            for start in range(0, len(chosen), _IMAGES_A_TASK)
        ]
        with ThreadPoolExecutor() as pool:
            views = pool.map(lambda part: augmented(self.images, part, augmentation, part), parts)
            return self._to_input(np.concatenate(list(views)))


def _made_ahead(plan: Plan, length: int | None) -> Prefetched | None:
    images = plan.images
    return Prefetched(plan, length, images.workers) if isinstance(images, ImageStream) else None


class _Batches(keras.utils.PyDataset):
    """Normalised images and their labels, in batches."""

    def __init__(self, plan: Plan, length: int | None) -> None:
        super().__init__(workers=1)
        self.plan = plan
        self._length = length
        self._made = _made_ahead(plan, length)

    @property
    def images(self) -> Images:
        """All images, uint8 `[N, H, W, C]`."""
        return self.plan.images

    @property
    def labels(self) -> np.ndarray:
        """Their labels, int32 `[N]`."""
        return self.plan.labels

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold each image once, the smaller last one included."""
        return self.plan.steps_per_epoch

    def size(self, index: int) -> int:
        """Returns how many images batch `index` has, all parts of it together."""
        return self.plan.size(index)

    def part(self, parts: Mapping[int, slice]) -> Self:
        """Returns the same batches, of which each has some rows alone.

        Args:
            parts: Which rows, by the size of the whole batch. Other batches are left whole.
        """
        some = copy.copy(self)
        some.plan = dataclasses.replace(self.plan, parts=parts)
        some._made = _made_ahead(some.plan, self._length)
        return some

    def __getitem__(self, index: int) -> Any:
        """Returns batch `index`."""
        return self.plan(index) if self._made is None else self._made[index]

    def close(self) -> None:
        """Ends the processes that decode a stream. They also end with this object."""
        if self._made is not None:
            self._made.close()


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

    The batches of a stream are made ahead, in the order of their indices, by processes of Grain's.
    There are no `workers` of Keras's to set: with more than one, Keras's queue goes on counting
    after the batch by which it builds a model on JAX and PyTorch, and training starts at the second
    batch.

    Args:
        images: uint8 `[N, H, W, C]`, or an `ImageStream`.
        labels: int `[N]`.
        batch_size: Images a batch.
        seed: Non-negative integer.
        mean: C floats, of pixels in [0, 1].
        std: C floats, of pixels in [0, 1].
        augmentation: `"crop_flip"` (each image is padded with 4 black pixels, cropped and mirrored
            at random, as is usual for CIFAR), `"crop"`, `"resized_crop_flip"` (a window of 8 % to
            100 % of the image's area and of an aspect of 3:4 to 4:3 is resized to the size of the
            images and mirrored at random, as is usual for ImageNet; Szegedy et al., 2015) or
            `"none"`. Defaults to `"crop_flip"`.
        first_batch: Batches of the training that were done before. Defaults to 0.

    Raises:
        InputError: An argument is out of its range.
    """

    def __init__(
        self,
        images: Images,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        mean: _Floats,
        std: _Floats,
        augmentation: str = "crop_flip",
        first_batch: int = 0,
    ) -> None:
        check_arrays("images", images, "labels", labels)
        check_augmentation(augmentation)
        self.plan: TrainingPlan
        plan = TrainingPlan(
            images,
            labels.astype(np.int32),
            checks.whole("batch_size", batch_size, 1),
            _to_input(mean, std),
            {},
            checks.whole("seed", seed, 0),
            augmentation,
            checks.whole("first_batch", first_batch, 0),
        )
        super().__init__(plan, None)

    @property
    def num_batches(self) -> None:
        """`None`: Keras then reads on from epoch to epoch instead of starting again at batch 0."""
        return None

    def __getitem__(self, index: int) -> Batch:
        """Returns batch `index`, counted from `first_batch`.

        Args:
            index: Non-negative integer.

        Returns:
            `(x, y)`: float32 `[B, H, W, C]`, or `[B, C, H, W]` where Keras's image data format is
            `"channels_first"`, and int32 `[B]`.
        """
        return super().__getitem__(index)

    def place(self, index: int) -> tuple[int, int, np.ndarray]:
        """Returns the epoch and the step of batch `index`, and its images' indices `[B]`."""
        return self.plan.place(index)


class EvaluationBatches(_Batches):
    """Batches in order, each image once and as it is.

    Args:
        images: uint8 `[N, H, W, C]`, or an `ImageStream`.
        labels: int `[N]`.
        batch_size: Images a batch; the last one may be smaller.
        mean: C floats, of pixels in [0, 1].
        std: C floats, of pixels in [0, 1].

    Raises:
        InputError: An argument is out of its range.
    """

    def __init__(
        self,
        images: Images,
        labels: np.ndarray,
        batch_size: int,
        mean: _Floats,
        std: _Floats,
    ) -> None:
        check_arrays("images", images, "labels", labels)
        batch_size = checks.whole("batch_size", batch_size, 1)
        plan = EvaluationPlan(images, labels.astype(np.int32), batch_size, _to_input(mean, std), {})
        super().__init__(plan, plan.steps_per_epoch)

    @property
    def num_batches(self) -> int:
        """Batches in one pass, the smaller last one included."""
        return self.steps_per_epoch

    def __getitem__(self, index: int) -> Batch:
        """Returns batch `index` of one pass.

        Args:
            index: Integer in `[0, num_batches)`.

        Returns:
            `(x, y)` as `TrainingBatches` gives them.
        """
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches}")
        return super().__getitem__(index)
