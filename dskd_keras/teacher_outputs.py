"""A teacher's outputs for fixed views of the training images, computed once and kept on disk."""

import contextlib
import functools
import hashlib
import os
import shutil

import numpy as np

from dskd_keras import artifacts
from dskd_keras.data import FixedViews, TrainingBatches
from dskd_keras.distiller import Targets
from dskd_keras.errors import InputError, TrainingError
from dskd_keras.teacher import FrozenTeacher

# What the teacher is run on at a time, and what is held in memory of its outputs.
_BATCH = 256
_CHUNK = 4096
_MEBIBYTE = 2**20


class TeacherOutputs:
    """Logits and feature maps of a teacher, in half precision and memory-mapped.

    Every view has two files, `logits-V.npy` `[N, C]` and `features-V.npy` `[N, …]` (channels last),
    float16 both: 2 · (C + H · W · D) bytes for each view of an image. Processes that read them
    share the pages that the operating system holds of them.

    Args:
        folder: A folder that `compute` filled.
        views: Number of views.
    """

    def __init__(self, folder, views):
        self._files = [
            {
                name: np.load(_file(folder, name, view), mmap_mode="r")
                for name in ("logits", "features")
            }
            for view in range(views)
        ]

    def __call__(self, view, chosen, names):
        """Returns the outputs for views of some images.

        Args:
            view: Integer in [0, views).
            chosen: Indices of training images, `[B]`.
            names: Which outputs: `"logits"`, `"features"` or both.

        Returns:
            A dict of float16 arrays, `[B, C]` and `[B, …]`.
        """
        return {name: self._files[view][name][chosen] for name in names}


class CachedBatches(TrainingBatches):
    """Training batches of fixed views, with the teacher's outputs for them as targets.

    Every epoch shows one view of each image, in an order of its own; epoch e shows view e mod K.

    Args:
        views: A `data.FixedViews`.
        outputs: The `TeacherOutputs` for them.
        names: The outputs that the distiller's terms need, its teacher's `output_names`.
        labels: int `[N]`.
        batch_size: Images a batch.
        seed: Of the order.
        mean: C floats, of pixels in [0, 1].
        std: C floats, of pixels in [0, 1].
        first_batch: As in `TrainingBatches`.
    """

    def __init__(self, views, outputs, names, labels, batch_size, seed, mean, std, first_batch=0):
        super().__init__(
            views.images, labels, batch_size, seed, mean, std, "none", first_batch=first_batch
        )
        self._views = views
        self._outputs = outputs
        self._names = names

    def __getitem__(self, index):
        """Returns `(x, y)`: inputs as in `TrainingBatches`, and `Targets`."""
        epoch, _, chosen = self.place(index)
        view = epoch % self._views.count
        outputs = self._outputs(view, chosen, self._names)
        return self._views(view, chosen), Targets(self.labels[chosen], outputs)


def fixed_views(dataset, count, augmentation):
    """Returns the `data.FixedViews` of the training images; without augmentation there is one.

    Args:
        dataset: A `data.ImageDataset`.
        count: Number of views.
        augmentation: As in `data.TrainingBatches`.
    """
    count = 1 if augmentation == "none" else count
    return FixedViews(dataset.x_train, count, augmentation, dataset.mean, dataset.std)


def batches(views, outputs, distiller, dataset, batch_size, seed):
    """Returns a function for `training.train` that makes the batches for a distiller.

    Args:
        views: A `data.FixedViews`.
        outputs: The `TeacherOutputs` for them.
        distiller: The `Distiller`, with a teacher.
        dataset: The `data.ImageDataset`.
        batch_size: Images a batch.
        seed: Of the order.
    """
    return functools.partial(
        CachedBatches, views, outputs, distiller.teacher.output_names, dataset.y_train, batch_size,
        seed, dataset.mean, dataset.std,
    )  # fmt: skip


def key(teacher, layer, dataset, augmentation):
    """Returns a short hex string that stands for everything that shapes the outputs of a view.

    Args:
        teacher: The teacher's model.
        layer: As in `Distiller`.
        dataset: A `data.ImageDataset`.
        augmentation: As in `data.TrainingBatches`.
    """
    digest = hashlib.blake2b(digest_size=6)
    for weight in teacher.get_weights():
        digest.update(weight.tobytes())  # an array in bfloat16 has no buffer to be read
    for part in (teacher.name, layer, dataset.fingerprint(), augmentation):
        digest.update(repr(part).encode())
    return digest.hexdigest()


def compute(teacher, layer, views, folder, console, waiting):
    """Runs the teacher over all views that are not in the folder yet.

    A view's files are renamed when they are whole, so that what a killed process leaves is never
    taken for outputs, and the next one goes on at the view that is missing.

    Args:
        teacher: The teacher's model. It is frozen.
        layer: As in `Distiller`.
        views: A `data.FixedViews`.
        folder: Where, a `pathlib.Path`. Several processes may ask for the same.
        console: A `rich.console.Console` for messages.
        waiting: Called without arguments if another process is computing them.

    Returns:
        `TeacherOutputs`.

    Raises:
        InputError: The disk has not enough room, or can't be written.
        TrainingError: An output is not finite in half precision.
    """
    artifacts.check_writable("teacher_dir", folder)
    with artifacts.locked("teacher_dir", folder, waiting):
        missing = [
            view for view in range(views.count) if not _file(folder, "logits", view).exists()
        ]
        if missing:
            artifacts.remove_leftovers(folder)
            frozen = FrozenTeacher(teacher, layer=layer)
            shapes = {
                "logits": (len(views.images), teacher.outputs[0].shape[-1]),
                "features": (len(views.images), *frozen.feature_shape),
            }
            size = sum(2 * int(np.prod(shape)) for shape in shapes.values())
            _check_room(folder, len(missing), size)
            console.print(
                f"Caching the teacher's outputs for {len(missing)} of {views.count} view(s) of "
                f"{len(views.images):,} images: {len(missing) * size / _MEBIBYTE:,.1f} MiB in "
                f"'{folder}'"
            )
            for view in missing:
                with artifacts.disk_errors_in_one_line(folder):
                    _compute_view(frozen, views, view, folder, shapes)
    return TeacherOutputs(folder, views.count)


def _compute_view(frozen, views, view, folder, shapes):
    asides = {name: folder / f".{name}.{os.getpid()}.tmp" for name in shapes}
    with contextlib.ExitStack() as files:
        # Written in order: a full disk is an error then, where a memory map would end the process.
        opened = {name: files.enter_context(open(aside, "wb")) for name, aside in asides.items()}
        for name, file in opened.items():
            header = {"descr": "<f2", "fortran_order": False, "shape": shapes[name]}
            np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(views.images), _CHUNK):
            chosen = np.arange(start, min(start + _CHUNK, len(views.images)))
            outputs = frozen.predict(views(view, chosen), batch_size=_BATCH)
            for name, file in opened.items():
                with np.errstate(over="ignore"):
                    half = outputs[name].astype("<f2")
                if not np.isfinite(half).all():
                    raise TrainingError(
                        f"cached_views: the teacher's {name} are not finite in half precision. Use "
                        "--cached_views 0."
                    )
                file.write(half.tobytes())
        for file in opened.values():
            file.flush()
            os.fsync(file.fileno())
    # The logits last: their file says that the view is there.
    for name in ("features", "logits"):
        asides[name].rename(_file(folder, name, view))


def _check_room(folder, views, size):
    free = shutil.disk_usage(folder).free
    if views * size > free:
        raise InputError(
            f"cached_views: the outputs of {views} view(s) need "
            f"{views * size / _MEBIBYTE:,.1f} MiB in '{folder}', where {free / _MEBIBYTE:,.1f} MiB "
            "are free. Take fewer, or another --teacher_dir."
        )


def _file(folder, name, view):
    return folder / f"{name}-{view:03d}.npy"
