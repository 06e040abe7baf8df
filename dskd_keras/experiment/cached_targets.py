"""A teacher's outputs for fixed views of the training images, computed once and kept on disk."""

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dskd_keras import files
from dskd_keras.data import FixedViews, ImageDataset, TrainingBatches
from dskd_keras.distiller import Distiller, Targets
from dskd_keras.errors import InputError, TrainingError
from dskd_keras.experiment import run_folder, training
from dskd_keras.experiment.run import Run
from dskd_keras.teacher import FrozenTeacher

# What the teacher is run on at a time, and what is held in memory of its outputs.
_BATCH = 256
_CHUNK = 4096
_MEBIBYTE = 2**20


class CachedTargets:
    """Views of the training images with a teacher's logits and feature maps for them.

    Every view has two files, `logits-V.npy` `[N, C]` and `features-V.npy` `[N, …]` (channels last),
    float16 both: 2 · (C + H · W · D) bytes for each view of an image. Of several teacher layers
    each has a file of its own, `features.K-V.npy`. They are memory-mapped: processes that read them
    share the pages that the operating system holds of them.
    """

    def __init__(self, folder: Path, views: FixedViews, stems: Mapping[str, str]):
        self.views = views
        self._files = [
            {
                name: np.load(_file(folder, stem, view), mmap_mode="r")
                for name, stem in stems.items()
            }
            for view in range(views.count)
        ]

    def outputs(self, view: int, chosen: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        """Returns the named outputs, float16 `[B, …]`, for a view of chosen images `[B]`."""
        return {name: self._files[view][name][chosen] for name in names}

    def batches(self, run: Run, distiller: Distiller, seed: int) -> training.BatchesFrom:
        """Returns the function for `training.train` that makes the batches for a distiller."""
        names = [] if distiller.teacher is None else distiller.teacher.output_names
        return functools.partial(CachedBatches, self, names, run, seed)


class CachedBatches(TrainingBatches):
    """Training batches of fixed views, with the teacher's outputs for them as targets.

    Every epoch shows one view of each image, in an order of its own; epoch e shows view e mod K.
    """

    def __init__(
        self, cached: CachedTargets, names: Sequence[str], run: Run, seed: int, first_batch: int = 0
    ):
        dataset = run.dataset
        super().__init__(
            dataset.x_train, dataset.y_train, run.config.batch_size, seed, dataset.mean,
            dataset.std, "none", first_batch=first_batch,
        )  # fmt: skip
        self._cached = cached
        self._names = names

    def __getitem__(self, index: int) -> tuple[np.ndarray, Targets]:  # type: ignore[override]
        """Returns `(x, y)`: inputs as in `TrainingBatches`, and `Targets`."""
        epoch, _, chosen = self.place(index)
        chosen = chosen[self.plan.rows(len(chosen))]
        view = epoch % self._cached.views.count
        outputs = self._cached.outputs(view, chosen, self._names)
        return self._cached.views(view, chosen), Targets(self.labels[chosen], outputs)


def fixed_views(dataset: ImageDataset, count: int, augmentation: str) -> FixedViews:
    """Returns so many views of the training images; without augmentation there is one."""
    count = 1 if augmentation == "none" else count
    return FixedViews(dataset.x_train, count, augmentation, dataset.mean, dataset.std)


def key(
    teacher: keras.Model,
    layer: list[str] | str | None,
    dataset: ImageDataset,
    augmentation: str | None,
) -> str:
    """Returns a short hex string that stands for everything that shapes the outputs of a view."""
    digest = hashlib.blake2b(digest_size=6)
    for weight in teacher.get_weights():
        digest.update(weight.tobytes())  # an array in bfloat16 has no buffer to be read
    for part in (teacher.name, layer, dataset.fingerprint, augmentation):
        digest.update(repr(part).encode())
    return digest.hexdigest()


def obtain(
    run: Run, teacher: keras.Model, views: int, layer: list[str] | str | None
) -> CachedTargets:
    """Reads the outputs for all views, after running the teacher over those that are missing.

    `layer` is that of `FrozenTeacher`; of an empty list there are logits alone.

    They lie under `teacher_dir`, in a folder whose name holds their key. A view's files are renamed
    when they are whole, so that what a killed process leaves is never taken for outputs, and the
    next one goes on at the view that is missing. The teacher is frozen.

    Raises:
        InputError: The disk has not enough room, or can't be written.
        TrainingError: An output is not finite in half precision.
    """
    augmentation = training.augmentation(run)
    name = f"{teacher.name}-{Path(run.dataset.name).stem}"
    name += f"-{key(teacher, layer, run.dataset, augmentation)}.outputs"
    folder = Path(run.config.teacher_dir) / name
    return compute(run, teacher, fixed_views(run.dataset, views, augmentation), folder, layer)


def compute(
    run: Run,
    teacher: keras.Model,
    views: FixedViews,
    folder: Path,
    layer: list[str] | str | None,
) -> CachedTargets:
    """Does the work of `obtain` for given views in a given folder."""
    waiting = "Waiting for another process, which runs the teacher."
    stems = _stems(layer)
    with run_folder.claimed("teacher_dir", folder, run.say, waiting):
        missing = [
            view for view in range(views.count) if not _file(folder, "logits", view).exists()
        ]
        if missing:
            frozen = FrozenTeacher(teacher, layer=layer)
            count = len(views.images)
            shapes: dict[str, tuple[int, ...]] = {"logits": (count, teacher.outputs[0].shape[-1])}
            shapes |= {name: (count, *shape) for name, shape in frozen.feature_shapes.items()}
            size = sum(2 * int(np.prod(shape)) for shape in shapes.values())
            _check_room(folder, len(missing), size)
            run.say(
                f"Caching the teacher's outputs for {len(missing)} of {views.count} view(s) of "
                f"{len(views.images):,} images: {len(missing) * size / _MEBIBYTE:,.1f} MiB in "
                f"'{folder}'"
            )
            for view in missing:
                with files.disk_errors_in_one_line(folder):
                    _compute_view(frozen, views, view, folder, shapes, stems)
    return CachedTargets(folder, views, stems)


def _compute_view(
    frozen: FrozenTeacher,
    views: FixedViews,
    view: int,
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    stems: Mapping[str, str],
) -> None:
    asides = {name: folder / f".{stem}.{os.getpid()}.tmp" for name, stem in stems.items()}
    with contextlib.ExitStack() as stack:
        # Written in order: a full disk is an error then, where a memory map would end the process.
        opened = {name: stack.enter_context(open(aside, "wb")) for name, aside in asides.items()}
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
    for name in sorted(stems, key="logits".__eq__):
        asides[name].rename(_file(folder, stems[name], view))


def _check_room(folder: Path, views: int, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if views * size > free:
        raise InputError(
            f"cached_views: the outputs of {views} view(s) need "
            f"{views * size / _MEBIBYTE:,.1f} MiB in '{folder}', where {free / _MEBIBYTE:,.1f} MiB "
            "are free. Take fewer, or another --teacher_dir."
        )


def _stems(layer: list[str] | str | None) -> dict[str, str]:
    """Returns what the files of each output are called, by its name in `FrozenTeacher`."""
    if not isinstance(layer, list):
        return {"logits": "logits", "features": "features"}
    # Names of nested layers hold slashes.
    maps = {f"features/{name}": f"features.{k}" for k, name in enumerate(dict.fromkeys(layer))}
    return {"logits": "logits", **maps}


def _file(folder: Path, stem: str, view: int) -> Path:
    return folder / f"{stem}-{view:03d}.npy"
