"""Data sets that need no TensorFlow: digits, `.npz` files and folders of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dskd_keras.data import arrays
from dskd_keras.data.dataset import LoadedImages
from dskd_keras.data.reading import AnyPath, in_threads, needed, refused
from dskd_keras.errors import InputError

_DIGITS_SIZE = 32
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
_TEST_FOLDERS = ("test", "val", "validation", "valid")
_FILES_A_TASK = 64


def load_digits(image_size: int | None = None) -> LoadedImages:
    """Loads scikit-learn's 1,797 handwritten digits, which need no download.

    Args:
        image_size: Height and width in pixels. Defaults to 32, the size the CIFAR models expect;
            the originals have 8.

    Returns:
        `LoadedImages` with three equal channels; about 20 % of the images are the test set.
    """
    digits = needed("sklearn.datasets", "scikit-learn").load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    images = np.repeat(arrays.resize(images, image_size or _DIGITS_SIZE), 3, axis=-1)
    labels = digits.target.astype(np.int32)
    train, test, note = arrays.hold_out(labels)
    return LoadedImages(
        name="digits",
        x_train=images[train],
        y_train=labels[train],
        x_test=images[test],
        y_test=labels[test],
        class_names=tuple("0123456789"),
        augmentation="crop",  # a mirrored digit is no digit
        notes=(note,),
    )


def load_npz(path: AnyPath, image_size: int | None = None) -> LoadedImages:
    """Loads a NumPy archive with `x_train`, `y_train`, `x_test` and `y_test`.

    Images are `[N, H, W, C]` or `[N, H, W]`. They may be of any integer type with values in 0 … 255
    or of a float type where the scale is beyond doubt: fractions that all lie in [0, 1], or whole
    numbers in [0, 255] that go above 1. Labels are integers `[N]` or `[N, 1]`. An optional array
    `class_names` holds one string a class; without it the classes are numbered up to the largest
    training label.

    Args:
        path: The file.
        image_size: Height and width to which the images are resized, or `None`.

    Returns:
        `LoadedImages`.

    Raises:
        InputError: The file can't be read or lacks an array, or an array can't be used.
    """
    path = Path(path).expanduser()
    content = _read_npz(path)
    missing = [key for key in _NPZ_KEYS if key not in content]
    if missing:
        raise InputError(
            f"dataset: {path} has no {', '.join(missing)}; it should have {', '.join(_NPZ_KEYS)}"
            f" and it has {', '.join(sorted(content)) or 'nothing'}."
        )
    x_train, x_test = _as_images(path, content)
    y_train, y_test = (_as_labels(path, key, content[key]) for key in ("y_train", "y_test"))
    if image_size:
        x_train, x_test = arrays.resize(x_train, image_size), arrays.resize(x_test, image_size)
    if "class_names" in content:
        class_names = tuple(str(name) for name in content["class_names"].ravel())
    else:
        class_names = tuple(str(label) for label in range(int(y_train.max(initial=-1)) + 1))
    return LoadedImages(path.stem, x_train, y_train, x_test, y_test, class_names)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with refused(f"dataset: {path} can't be read as a .npz archive of plain arrays"):
        try:
            archive = np.load(path, allow_pickle=False)
        except ValueError as error:
            # For whatever is no archive NumPy suggests to run the code in it.
            raise ValueError("it is none") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            return {key: archive[key] for key in archive.files}


def _as_images(path: Path, content: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Brings `x_train` and `x_test` to uint8 `[N, H, W, C]`, both by the same rule."""
    images = [content["x_train"], content["x_test"]]
    fields = [f"dataset: {key} in {path}" for key in ("x_train", "x_test")]
    for index, (field, array) in enumerate(zip(fields, images, strict=True)):
        if array.ndim == 3:
            images[index] = array = array[..., None]
        if array.ndim != 4:
            raise InputError(f"{field}: shape {array.shape} should be [N, H, W, C] or [N, H, W].")
        if array.shape[1] <= 4 < array.shape[3]:
            raise InputError(
                f"{field}: shape {array.shape} looks like [N, C, H, W]; the channels should come"
                " last."
            )
        if array.size == 0:
            raise InputError(f"{field}: shape {array.shape} holds no pixels.")
        if array.dtype.kind not in "uif":
            raise InputError(f"{field}: dtype {array.dtype} should be uint8.")
    is_float = [array.dtype.kind == "f" for array in images]
    if is_float[0] != is_float[1]:
        raise InputError(
            f"{fields[1]}: dtype {images[1].dtype} should be that of x_train, {images[0].dtype}."
        )
    scale = _float_scale(fields[0], images[0]) if is_float[0] else 1
    return tuple(
        _to_uint8(field, array, scale) for field, array in zip(fields, images, strict=True)
    )


def _float_scale(field: str, images: np.ndarray) -> int:
    """Returns what brings float images to [0, 255], or refuses where that can't be known."""
    largest, whole = images.max(), _is_whole(images)
    if largest <= 1 and not whole:
        return 255
    if largest > 1 and whole:
        return 1
    raise InputError(
        f"{field}: {images.dtype} values from {images.min():g} to {largest:g} should be fractions"
        " in [0, 1] or whole numbers in [0, 255]; save the images as uint8."
    )


def _to_uint8(field: str, images: np.ndarray, scale: int) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    # Written so that a NaN fails it too.
    if not (low >= 0 and high * scale <= 255 and (scale != 1 or _is_whole(images))):
        kind = "whole numbers" if scale == 1 else "fractions, as in x_train,"
        raise InputError(
            f"{field}: {images.dtype} values from {low:g} to {high:g} should be {kind} in"
            f" [0, {255 // scale}]; save the images as uint8."
        )
    return np.rint(images * scale).astype(np.uint8) if scale != 1 else images.astype(np.uint8)


def _is_whole(images: np.ndarray) -> bool:
    return images.dtype.kind != "f" or bool((images == np.rint(images)).all())


def _as_labels(path: Path, key: str, labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise InputError(
            f"dataset: {key} in {path}: shape {labels.shape} and dtype {labels.dtype} should be [N]"
            " or [N, 1] of integers from 0."
        )
    bounds = np.iinfo(np.int32)
    if len(labels) and not bounds.min <= labels.min() <= labels.max() <= bounds.max:
        raise InputError(f"dataset: {key} in {path}: label {labels.max()} is out of all range.")
    return labels.astype(np.int32)


def load_folder(path: AnyPath, image_size: int | None = None) -> LoadedImages:
    """Loads images that are sorted into one folder a class.

    Two layouts are read: `DIR/train/CLASS/*` with `DIR/test/CLASS/*` (or `val`, `validation`,
    `valid`), and `DIR/CLASS/*`. Where there is no test folder, 20 % of the images are held out.
    Images become RGB; files that are no images are passed over.

    Args:
        path: The folder.
        image_size: Height and width to which the images are resized, or `None` where all have one
            size.

    Returns:
        `LoadedImages`, classes in the order of their names.

    Raises:
        InputError: There are no class folders or no images, an image can't be read, sizes
            differ, or the test part has a class that the training part lacks.
    """
    path = Path(path).expanduser()
    notes = []
    parts = [name for name in _TEST_FOLDERS if (path / name).is_dir()]
    has_train = (path / "train").is_dir()
    if parts and not has_train:
        raise InputError(f"dataset: {path} has a folder {parts[0]!r} but no folder 'train'.")
    train = _list_classes(path / "train" if has_train else path)
    class_names = tuple(train)
    train_files, train_labels = _list_files(train, class_names)
    if parts:
        test = _list_classes(path / parts[0])
        unknown = [name for name in test if name not in train]
        if unknown:
            raise InputError(
                f"dataset: {path / parts[0]} has the class {unknown[0]!r}, which {path / 'train'}"
                " lacks."
            )
        test_files, test_labels = _list_files(test, class_names)
        notes += [f"the folder {name!r} is not used" for name in parts[1:]]
    else:
        kept, held_out, note = arrays.hold_out(train_labels)
        test_files, test_labels = [train_files[i] for i in held_out], train_labels[held_out]
        train_files, train_labels = [train_files[i] for i in kept], train_labels[kept]
        notes.append(note)
    images = _decode_files([*train_files, *test_files], image_size)
    return LoadedImages(
        name=path.resolve().name,
        x_train=images[: len(train_files)],
        y_train=train_labels,
        x_test=images[len(train_files) :],
        y_test=test_labels,
        class_names=class_names,
        notes=tuple(notes),
    )


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Returns the image files of each class folder, both sorted by name."""
    with refused(f"dataset: {folder} can't be read", OSError):
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        names = [name for name in names if not name.startswith((".", "__"))]
        classes = {
            name: sorted(
                file
                for file in (folder / name).iterdir()
                if file.suffix.lower() in _IMAGE_SUFFIXES and not file.name.startswith(".")
            )
            for name in names
        }
    if not classes:
        raise InputError(f"dataset: {folder} should hold one folder a class, and holds none.")
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise InputError(
            f"dataset: {folder / empty[0]} should hold the images of a class, and holds none"
            f" ({', '.join(sorted(_IMAGE_SUFFIXES))})."
        )
    return classes


def _list_files(
    classes: Mapping[str, Sequence[Path]], class_names: Sequence[str]
) -> tuple[list[Path], np.ndarray]:
    """Returns all files, class after class, and their labels int32 `[N]`."""
    label_of = {name: label for label, name in enumerate(class_names)}
    files = [file for of_class in classes.values() for file in of_class]
    labels = [label_of[name] for name, of_class in classes.items() for _ in of_class]
    return files, np.asarray(labels, np.int32)


def _decode_files(files: Sequence[Path], image_size: int | None) -> np.ndarray:
    """Returns uint8 `[N, H, W, 3]`, in the order of `files`."""
    first = _decode(files[0], image_size)
    images = arrays.allocate_images((len(files), *first.shape))

    def decode_some(start: int) -> None:
        for index in range(start, min(start + _FILES_A_TASK, len(files))):
            image = _decode(files[index], image_size)
            if image.shape != first.shape:
                raise InputError(
                    f"dataset: images differ in size: {files[0]} has"
                    f" {first.shape[1]}×{first.shape[0]} pixels and {files[index]} has"
                    f" {image.shape[1]}×{image.shape[0]}; pass --image_size to resize all of them."
                )
            images[index] = image

    in_threads(decode_some, range(0, len(files), _FILES_A_TASK))
    return images


def _decode(file: Path, image_size: int | None) -> np.ndarray:
    pillow = needed("PIL.Image", "pillow")
    with (
        refused(f"dataset: {file} can't be read as an image"),
        pillow.open(file) as image,
    ):
        if image.mode.startswith(("I", "F")):
            # Pillow would clip these to white on the way to RGB.
            raise ValueError("it has more than 8 bits a channel")
        image = image.convert("RGB")
        if image_size:
            image = image.resize((image_size, image_size), pillow.Resampling.BILINEAR)
        return np.asarray(image)
