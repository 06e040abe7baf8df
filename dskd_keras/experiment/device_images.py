"""Training images that lie on the device, of which each training step makes its own batch.

A host that crops and copies images for an accelerator is slower than the accelerator; so that one
gets no images, but which of them, from where and whether mirrored.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from dskd_keras import data
from dskd_keras.distiller import Distiller
from dskd_keras.errors import InputError

# The backends count the pixels of all images in 32 bits.
_MOST_PIXELS = 2**31 - 1


def check(dataset: data.ImageDataset, augmentation: str) -> None:
    """Raises `InputError` where a data set can't be trained on from the device.

    Args:
        dataset: Its training images would lie there.
        augmentation: One of `AUGMENTATIONS`.
    """
    images = dataset.x_train
    if isinstance(images, data.ImageStream):
        raise InputError(
            "augment_on: device, but the images stay in their files, as a stream. Set it to host."
        )
    if augmentation == "resized_crop_flip":
        raise InputError(
            f"augment_on: device, but augmentation is {augmentation}, which resizes images. Set it "
            "to host, or take crop_flip, crop or none."
        )
    count, height, width, _ = images.shape
    if count * height * width > _MOST_PIXELS:
        raise InputError(
            f"augment_on: device, but {count:,} images of {height}×{width} are more than "
            f"{_MOST_PIXELS:,} pixels. Set it to host."
        )


class MovedBatches(data.TrainingBatches):
    """Training batches as what they are made by: for `DeviceDistiller`, without images."""

    def __getitem__(self, index: int) -> Any:
        """Returns what `TrainingPlan.moves` does."""
        return self.plan.moves(index)


class DeviceImages:
    """All training images, in variables on the device.

    Args:
        dataset: One that `check` lets pass.
    """

    def __init__(self, dataset: data.ImageDataset) -> None:
        images = np.asarray(dataset.x_train)
        self._shape = images.shape
        channels = self._shape[-1]
        # The float of each byte, as the host computes it: other ways to it round differently.
        bytes_ = np.repeat(np.arange(256, dtype=np.uint8)[:, np.newaxis, np.newaxis], channels, 2)
        floats = data.normalize(bytes_, dataset.mean, dataset.std)
        self.variables = [
            keras.Variable(images.reshape(-1, channels), dtype="uint8", trainable=False),
            keras.Variable(floats.reshape(-1), dtype="float32", trainable=False),
        ]

    def __call__(self, made_by: dict[str, Any], values: Any = None) -> Any:
        """Returns the batch that the host would have made, to the bit.

        Args:
            made_by: As of `MovedBatches`.
            values: Of the variables. Defaults to what they hold.

        Returns:
            float32 `[B, H, W, C]`, or `[B, C, H, W]` where Keras's image data format is
            `"channels_first"`.
        """
        pixels, floats = self.variables if values is None else values
        _, height, width, channels = self._shape
        corners = ops.cast(made_by["corners"], "int32")
        rows = corners[:, :1] + ops.arange(height, dtype="int32")
        columns = ops.arange(width, dtype="int32")
        flipped = ops.cast(made_by["flipped"], "bool")[:, None]
        columns = corners[:, 1:] + ops.where(flipped, ops.flip(columns), columns)
        inside = ((rows >= 0) & (rows < height))[:, :, None]
        inside = inside & ((columns >= 0) & (columns < width))[:, None, :]
        # Of the padding any pixel is read, and made black.
        rows, columns = ops.clip(rows, 0, height - 1), ops.clip(columns, 0, width - 1)
        first = ops.cast(made_by["images"], "int32")[:, None, None] * (height * width)
        places = first + rows[:, :, None] * width + columns[:, None, :]
        read = ops.cast(ops.take(pixels, places, axis=0), "int32")
        read = ops.where(inside[..., None], read, 0)
        places = read * channels + ops.arange(channels, dtype="int32")
        images = ops.take(floats, places, axis=0)
        if keras.config.image_data_format() == "channels_first":
            images = ops.transpose(images, (0, 3, 1, 2))
        return images


class DeviceDistiller(Distiller):
    """A distiller that trains on `MovedBatches`. Arguments are those of `Distiller`."""

    def __init__(self, *args: Any, images: DeviceImages, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # No layer: what is saved of the distiller holds no images.
        self._images = images

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        """As a `Distiller`; it is built by a batch for training and evaluates on images."""
        if isinstance(inputs, dict):
            inputs = self._images(inputs)
        return super().call(inputs, training)

    def train_step(self, *args: Any) -> Any:
        """Makes the images of the batch, then trains on them."""
        *state, batch = args
        made_by, *rest = batch
        values = None
        if state:
            # As the teacher's variables, which come after these, they hold no values on JAX.
            _, non_trainable, *_ = state[0]
            end = len(non_trainable)
            end -= 0 if self.teacher is None else len(self.teacher.variables)
            values = non_trainable[end - len(self._images.variables) : end]
        return super().train_step(*state, (self._images(made_by, values), *rest))

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """A distiller's, with the images before the teacher's: JAX's step needs all of them."""
        variables = super().non_trainable_variables
        end = len(variables) - (0 if self.teacher is None else len(self.teacher.variables))
        return [*variables[:end], *self._images.variables, *variables[end:]]
