"""Several devices that train one model together, each a share of every batch.

What distributes is Keras's: `keras.distribution.DataParallel` on JAX, `tf.distribute` on
TensorFlow. One device and several give the same losses, allocations, metrics and weights but for
rounding: batch normalisation sees the whole batch, and a smaller last batch that doesn't divide
counts as it does on one device. What is drawn at random within a step, such as the masks of
`Dropout`, is another draw where the number of devices is another.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras

from dskd_keras import keras_internals
from dskd_keras.data import EvaluationBatches, ImageDataset, TrainingBatches
from dskd_keras.errors import InputError, wrong
from dskd_keras.experiment import hosts
from dskd_keras.experiment.config import ALL, ExperimentConfig

# Losses that compare the images of a batch with one another.
_OVER_BATCH = ("dist", "feature_normalized_mean_squared_error")
Batches = EvaluationBatches | TrainingBatches


class Devices:
    """The devices of a run. This one is the backend's default device alone."""

    count = 1

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """A context in which models are made, compiled and trained on all the devices."""
        yield

    @contextlib.contextmanager
    def training(self, model: keras.Model) -> Iterator[None]:
        """A context for `fit` within the scope."""
        yield

    def copied(self, model: keras.Model) -> keras.Model:
        """Returns a model with the same weights on all the devices, outside the scope on one."""
        return model

    def shares(self, batches: Batches) -> keras.utils.PyDataset:
        """Returns the batches as this process gives them to `fit`."""
        return batches

    def can_share(self, images: int, size: int) -> bool:
        """Returns whether all batches of a size, out of so many images, can be computed."""
        return True

    def sizes(self, images: int, most: int = 256) -> list[int]:
        """Returns the sizes of batches, out of so many images, that can be computed, largest first.

        Args:
            images: How many there are.
            most: The largest size.
        """
        return [size for size in range(most, 0, -1) if self.can_share(images, size)]


class _Several(Devices):
    def __init__(self, count: int) -> None:
        self.count = count

    def copied(self, model: keras.Model) -> keras.Model:
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        return copy


@functools.cache
def _mirrored(names: tuple[str, ...]) -> Any:
    """Returns the one strategy of some devices: a second one's reductions get the first one's."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(names)


class _MirroredDevices(_Several):
    """TensorFlow's devices: replicas that add up their gradients and statistics."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(len(names))
        self._strategy = _mirrored(tuple(names))

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        with self._strategy.scope():
            yield

    def can_share(self, images: int, size: int) -> bool:
        # Keras builds a model by the first batch, whose parts it averages. oneDNN's kernels fail on
        # no images, which TensorFlow gives to a replica where they run out.
        first, last = min(images, size), images % size
        return first % self.count == 0 and (last == 0 or last >= self.count)

    @contextlib.contextmanager
    def training(self, model: keras.Model) -> Iterator[None]:
        # For the training alone: JAX and PyTorch load no model that is saved with the setting.
        changed = [
            layer
            for layer in keras_internals.flat_layers(model)
            if isinstance(layer, keras.layers.BatchNormalization) and not layer.synchronized
        ]
        for layer in changed:
            layer.synchronized = True
        try:
            yield
        finally:
            for layer in changed:
                layer.synchronized = False


class _DataParallel(keras.distribution.DataParallel):
    """Keras's, but for batches that don't divide: every device computes all of them."""

    def get_data_layout(self, data_shape: Any) -> Any:
        if data_shape[0] % self.num_model_replicas == 0:
            return super().get_data_layout(data_shape)
        return keras.distribution.TensorLayout([None] * len(data_shape), self.device_mesh)


class _ShardedDevices(_Several):
    """JAX's devices: one program over arrays whose rows are spread over them."""

    def __init__(self, devices: list[Any]) -> None:
        super().__init__(len(devices))
        self._distribution = _DataParallel(devices=devices, auto_shard_dataset=False)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        with self._distribution.scope(), keras_internals.layout_of_each_batch():
            yield

    def shares(self, batches: Batches) -> keras.utils.PyDataset:
        return batches if hosts.here().count == 1 else _Shares(batches, self._distribution)


class _Shares(keras.utils.PyDataset):
    """Batches over the devices of all processes, of which each reads what its devices need.

    That is its share of the rows, and the whole batch where that doesn't divide.
    """

    def __init__(self, batches: Batches, distribution: _DataParallel) -> None:
        super().__init__(workers=1)
        self._distribution = distribution
        sizes = {batches.size(index) for index in range(batches.steps_per_epoch)}
        self._parts = {size: self._rows(size) for size in sizes}
        self._batches = batches.part(self._parts)

    @property
    def num_batches(self) -> int | None:
        return self._batches.num_batches

    def __getitem__(self, index: int) -> Any:
        import jax

        size = self._batches.size(index)
        first = self._parts[size].start

        def spread(rows: Any) -> Any:
            def of_device(place: tuple[slice, ...]) -> Any:
                start, stop, _ = place[0].indices(size)
                return rows[start - first : stop - first]

            shape = (size, *rows.shape[1:])
            return jax.make_array_from_callback(shape, self._sharding(shape), of_device)

        return keras.tree.map_structure(spread, self._batches[index])

    def _sharding(self, shape: tuple[int, ...]) -> Any:
        return self._distribution.get_data_layout(shape).backend_layout

    def _rows(self, size: int) -> slice:
        """Returns what the devices of this process need of a batch."""
        places = self._sharding((size,)).addressable_devices_indices_map((size,)).values()
        ends = [place.indices(size)[:2] for (place,) in places]
        return slice(min(start for start, _ in ends), max(stop for _, stop in ends))


def find(config: ExperimentConfig) -> Devices:
    """Returns the devices that a configuration asks for.

    Raises:
        InputError: There are fewer, the backend can't use several, or no batch divides among them.
    """
    asked, backend = config.devices, keras.backend.backend()
    if asked == 1:
        return Devices()
    if backend == "torch":
        raise InputError(
            f"devices: {asked}, but Keras distributes nothing on PyTorch. Set it to 1, or set "
            "KERAS_BACKEND to jax or tensorflow."
        )
    present = _present(backend)
    count = len(present) if asked == ALL else int(asked)
    if hosts.here().count > 1 and count != len(present):
        raise wrong("devices", asked, f"{len(present)}, as many as all processes have, or {ALL}")
    if count > len(present):
        raise wrong("devices", asked, f"at most {len(present)}, as many as there are, or {ALL}")
    if count == 1:
        return Devices()
    if config.batch_size % count:
        above = (config.batch_size // count + 1) * count
        below = above - count
        raise InputError(
            f"batch_size: {config.batch_size}, but {count} devices share every batch. Take a "
            f"multiple of {count}, such as {f'{below} or ' if below else ''}{above}."
        )
    if backend == "tensorflow":
        for field in ("prediction_loss", "feature_loss"):
            if (loss := getattr(config, field)) in _OVER_BATCH:
                raise InputError(
                    f"{field}: {loss}, but it compares the images of a batch, of which each of "
                    f"{count} devices sees a part on TensorFlow. Set devices to 1, or "
                    "KERAS_BACKEND to jax."
                )
    if backend == "jax":
        return _ShardedDevices(present[:count])
    return _MirroredDevices(present[:count])


def check_batches(devices: Devices, dataset: ImageDataset, config: ExperimentConfig) -> None:
    """Raises `InputError` where the images make a batch that the devices can't share."""
    for part in ("validation", "test"):
        if (images := getattr(dataset, f"x_{part}")) is not None and not devices.sizes(len(images)):
            raise InputError(
                f"devices: {devices.count}, but {len(images)} {part} images can't be shared on "
                "TensorFlow. Set it to 1."
            )
    images, size = len(dataset.x_train), config.batch_size
    if not devices.can_share(images, size):
        near = sorted(devices.sizes(images), key=lambda other: abs(other - size))[:4]
        raise InputError(
            f"batch_size: {size}, but on TensorFlow the first batch of {images:,} training images "
            f"has to divide among {devices.count} devices, and the last one to have an image for "
            f"each. Take {' or '.join(map(str, near)) or 'one device'}."
        )


def _present(backend: str) -> list[Any]:
    if backend == "jax":
        import jax

        return jax.devices()
    import tensorflow as tf

    accelerators = tf.config.list_logical_devices("GPU")
    return [device.name for device in accelerators or tf.config.list_logical_devices("CPU")]
