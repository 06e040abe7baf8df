"""Data sets that need no TensorFlow: digits, `.npz` files and folders of images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dskd_keras.data import arrays, pixels, streams
from dskd_keras.data.dataset import MOST_CLASSES, LoadedImages
from dskd_keras.data.plans import Images
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

    They have 8 pixels a side; by default they are resized to 32, which the CIFAR models expect.
    Their three channels are equal.
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
        names = tuple(str(name) for name in content["class_names"].ravel())
    else:
        names = _numbered(path, y_train)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"dataset: class_names in {path}: {twice!r} is the name of two classes.")
    return LoadedImages(path.stem, x_train, y_train, x_test, y_test, names)


def _numbered(path: Path, labels: np.ndarray) -> tuple[str, ...]:
    """Returns a name for each label up to the largest."""
    largest = int(labels.max(initial=-1))
    if largest >= MOST_CLASSES:
        raise InputError(
            f"dataset: y_train in {path}: label {largest} should be less than {MOST_CLASSES}. "
            "Labels number the classes from 0: numpy.unique(y, return_inverse=True) renumbers them."
        )
    return tuple(map(str, range(largest + 1)))


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


def _as_images(path: Path, content: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Brings `x_train` and `x_test` to uint8 `[N, H, W, C]`, both by the same rule."""
    is_float = content["x_train"].dtype.kind == "f"
    scale = 255 if is_float and content["x_train"].max(initial=0) <= 1 else 1
    converted = []
    for key in ("x_train", "x_test"):
        field, images = f"dataset: {key} in {path}", content[key]
        if images.ndim not in (3, 4) or 0 in images.shape or images.dtype.kind not in "uif":
            raise InputError(
                f"{field}: shape {images.shape} and dtype {images.dtype} should be [N, H, W, C] or"
                " [N, H, W], none of them 0, and uint8."
            )
        if images.ndim == 4 and images.shape[1] <= 4 < images.shape[3]:
            raise InputError(
                f"{field}: shape {images.shape} looks like [N, C, H, W]; the channels should come"
                " last."
            )
        if (images.dtype.kind == "f") != is_float:
            raise InputError(
                f"{field}: dtype {images.dtype} should be that of x_train,"
                f" {content['x_train'].dtype}."
            )
        if strange := np.count_nonzero(~np.isfinite(images)) if is_float else 0:
            raise InputError(f"{field}: {strange} of {images.size} values are not finite.")
        low, high = images.min(), images.max()
        whole = not is_float or (images == np.rint(images)).all()
        # Zeros and ones alone may be on either scale.
        known = whole if scale == 1 else not (whole and key == "x_train")
        if not (known and low >= 0 and high * scale <= 255):
            raise InputError(
                f"{field}: {images.dtype} values from {low:g} to {high:g} should be fractions in"
                " [0, 1] or whole numbers in [0, 255], as in x_train; save the images as uint8."
            )
        images = np.rint(images * scale) if scale > 1 else images
        converted.append(images.astype(np.uint8, copy=False).reshape(*images.shape[:3], -1))
    return converted


def _as_labels(path: Path, key: str, labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    is_whole = labels.ndim == 1 and labels.dtype.kind in "ui"
    if not is_whole or (labels != labels.astype(np.int32)).any():
        raise InputError(
            f"dataset: {key} in {path}: shape {labels.shape} and dtype {labels.dtype} should be [N]"
            " or [N, 1] of integers from 0, in 32 bits."
        )
    return labels.astype(np.int32)


def load_folder(
    path: AnyPath, image_size: int | None = None, stream: bool | None = False
) -> LoadedImages:
    """Loads images that are sorted into one folder a class, in the order of the classes' names.

    Two layouts are read: `DIR/train/CLASS/*` with `DIR/test/CLASS/*` (or `val`, `validation`,
    `valid`), and `DIR/CLASS/*`. Where there is no test folder, 20 % of the images are held out.
    Images become RGB; files that are no images are passed over. `stream` is that of
    `dskd_keras.data.load`.
    """
    path = Path(path).expanduser()
    parts = [name for name in _TEST_FOLDERS if (path / name).is_dir()]
    has_train = (path / "train").is_dir()
    if parts and not has_train:
        raise InputError(f"dataset: {path} has a folder {parts[0]!r} but no folder 'train'.")
    classes = _list_classes(path / "train" if has_train else path)
    class_names = tuple(classes)
    files, labels = _list_files(classes, class_names)
    if parts:
        test = _list_classes(path / parts[0])
        unknown = [name for name in test if name not in classes]
        if unknown:
            raise InputError(
                f"dataset: {path / parts[0]} has the class {unknown[0]!r}, which {path / 'train'}"
                " lacks."
            )
        notes = [f"the folder {name!r} is not used" for name in parts[1:]]
        count = len(files)
        test_files, test_labels = _list_files(test, class_names)
        files, labels = [*files, *test_files], np.concatenate([labels, test_labels])
    else:
        kept, held_out, note = arrays.hold_out(labels)
        notes, count, order = [note], len(kept), np.concatenate([kept, held_out])
        files, labels = [files[index] for index in order], labels[order]
    first = _decode(files[0], image_size)
    stream, large = streams.is_wanted(stream, len(files), first.shape)
    notes += large
    if stream:
        images: Images = streams.open_stream(streams.EncodedFiles(files), image_size)
    else:
        images = _decode_files(files, image_size, first.shape)
    x_train, x_test = arrays.divide(images, count)
    return LoadedImages(
        name=path.resolve().name,
        x_train=x_train,
        y_train=labels[:count],
        x_test=x_test,
        y_test=labels[count:],
        class_names=class_names,
        notes=tuple(notes),
    )


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Returns the image files of each class folder, both sorted by name."""
    with refused(f"dataset: {folder} can't be read", OSError):
        classes = {
            entry.name: sorted(
                file
                for file in entry.iterdir()
                if file.suffix.lower() in _IMAGE_SUFFIXES and not file.name.startswith(".")
            )
            for entry in sorted(folder.iterdir())
            if entry.is_dir() and not entry.name.startswith((".", "__"))
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
    """Returns all files, class after class, and their labels, int32 `[N]`."""
    files = [file for of_class in classes.values() for file in of_class]
    labels = [class_names.index(name) for name in classes]
    return files, np.repeat(np.asarray(labels, np.int32), [*map(len, classes.values())])


def _decode_files(
    files: Sequence[Path], image_size: int | None, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns uint8 `[N, H, W, 3]`, in the order of `files`."""
    images = arrays.allocate_images((len(files), *shape))

    def decode_some(start: int) -> None:
        for index in range(start, min(start + _FILES_A_TASK, len(files))):
            image = _decode(files[index], image_size)
            if image.shape != shape:
                raise streams.different_sizes(str(files[0]), shape, str(files[index]), image.shape)
            images[index] = image

    in_threads(decode_some, range(0, len(files), _FILES_A_TASK))
    return images


def _decode(file: Path, image_size: int | None) -> np.ndarray:
    # Opening a pipe would wait for whoever writes to it.
    if not file.is_file():
        raise InputError(f"dataset: {file} is no regular file.")
    with refused(f"dataset: {file} can't be read", OSError), open(file, "rb") as opened:
        image = streams.decode(opened, str(file))
    return pixels.resize(image, (image_size, image_size)) if image_size else image
