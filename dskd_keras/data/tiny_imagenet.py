"""Tiny ImageNet as a builder of TensorFlow Datasets, downloaded or read from a local copy.

Importing this module registers the builder: `tfds.load("tiny_imagenet")` works from then on.
"""

import contextlib
import hashlib
import io
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow_datasets as tfds

from dskd_keras.data.reading import AnyPath, needed, refused
from dskd_keras.errors import InputError

NAME = "tiny_imagenet"
# Its size and its checksum are in checksums.tsv, where TFDS looks for them.
_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_FOLDER = "tiny-imagenet-200"
_SIDE = 64
_OFFICIAL = {"train": 100_000, "validation": 10_000}
_ANNOTATIONS = "val/val_annotations.txt"
_LAYOUT = {"train": "train/CLASS/images", "validation": "val/images"}
# The names of the 200 classes by WordNet id, in the order of their labels. They are fixed here, so
# that no download is needed to know them and no archive gives a class another label.
_TABLE = Path(__file__).with_name("tiny_imagenet_classes.tsv").read_text(encoding="utf-8")
_CLASSES = dict(line.split("\t") for line in _TABLE.splitlines())
_LABELS = {class_id: label for label, class_id in enumerate(_CLASSES)}
# macOS leaves files like "._val_0.JPEG" beside the images.
_IMAGE = r"(?!\.)[^/]+\.(?i:jpe?g)"
# The sizes in bytes of files by their names, and a function that reads one.
_Files = tuple[dict[str, int], Callable[[str], bytes]]
_Examples = Iterator[tuple[str, dict[str, Any]]]


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Tiny ImageNet: 64×64 photographs of 200 of ImageNet's classes.

    The splits are `train` (500 images a class) and `validation` (50 a class). The official test
    split is left out: its labels were never published. An example is a dictionary of `image`, uint8
    `[64, 64, 3]`, and `label`, an integer below 200. Labels follow the sorted WordNet ids, as those
    of torchvision's `ImageFolder` do, and with it those of published PyTorch models.

    Le and Yang, "Tiny ImageNet Visual Recognition Challenge", CS231N, Stanford University, 2015.

    `source` is the official zip archive, the folder that it extracts to, or a `Source`; it is read
    instead of the download. What was prepared from another source is refused, never used in its
    place. With `tfds.load` it goes into `builder_kwargs`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The first release: splits train and validation."}  # noqa: RUF012

    def __init__(self, *, source: "AnyPath | Source | None" = None, **kwargs: Any) -> None:
        self.source = source if source is None or isinstance(source, Source) else Source(source)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="64×64 photographs of 200 of ImageNet's classes. The official test split"
            " has no public labels and is left out.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(_SIDE, _SIDE, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(_CLASSES.values())),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://cs231n.stanford.edu/",
            citation="@techreport{le2015tiny, title={Tiny ImageNet Visual Recognition Challenge}, "
            "author={Le, Ya and Yang, Xuan}, institution={CS231N, Stanford University}, "
            "year={2015}}",
            metadata=tfds.core.MetadataDict(),
        )

    def download_and_prepare(self, **kwargs: Any) -> None:
        """Prepares the data where it isn't there yet; refuses what another source gave."""
        if self.source is None:
            super().download_and_prepare(**kwargs)
            return
        if self.data_path.exists():
            # By way of `items`, since `get` doesn't make TFDS read the file.
            recorded = dict(self.info.metadata.items())
            if recorded.get("fingerprint") != self.source.fingerprint:
                raise InputError(
                    f"data_dir: {self.data_dir} was prepared from"
                    f" {recorded.get('source', 'an unknown source')}, whose images are not those of"
                    f" {self.source.path}; remove the folder {self.data_dir} to prepare it anew."
                )
        # TFDS makes a folder for downloads even where there are none, and speaks of downloading.
        with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
            super().download_and_prepare(**(kwargs | {"download_dir": unused}))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, _Examples]:
        source = self.source or Source(dl_manager.download(_URL))
        self.info.metadata.update(
            source=str(source.path) if self.source else _URL, fingerprint=source.fingerprint
        )
        return {split: self._generate_examples(source, split) for split in source.labels}

    def _generate_examples(self, source: "Source", split: str) -> _Examples:
        for name, image in source.read_images(split):
            # Training and validation files have names of their own, and so the same order in
            # every preparation.
            example = {"image": image, "label": source.labels[split][name]}
            yield PurePosixPath(name).name, example


class Source:
    """A local copy of Tiny ImageNet: the zip archive, or the folder that it extracts to.

    The archive is read in place; nothing is extracted. Raises `InputError` where it can't be read
    or doesn't have the official layout.

    Attributes:
        path: The absolute path.
        labels: For each split, the label of each image by its name, such as
            `"train/n01443537/images/n01443537_0.JPEG"`.
        fingerprint: Hex string that stands for the images' names, sizes in bytes and labels. An
            archive and what it extracts to have the same.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = Path(os.path.abspath(os.path.expanduser(path)))
        with self._open() as (sizes, read):
            self.labels = {
                "train": self._train_labels(sizes),
                "validation": self._validation_labels(sizes, read),
            }
        digest = hashlib.blake2b(digest_size=8)
        for split, labels in self.labels.items():
            if not labels:
                raise self._error(f"has no .JPEG images in {_LAYOUT[split]}")
            for name, label in labels.items():
                digest.update(repr((name, sizes[name], label)).encode())
        self.fingerprint = digest.hexdigest()

    def read_images(self, split: str) -> Iterator[tuple[str, bytes]]:
        """Yields the name and the contents of each image of a split, sorted by name.

        Raises `InputError` about the file that is not a whole JPEG image of 64×64 pixels.
        """
        pillow = needed("PIL.Image", "pillow")
        with self._open() as (_, read):
            for name in self.labels[split]:
                content = read(name)
                with self._refused(f"has {name}, which is no JPEG image of {_SIDE}×{_SIDE} pixels"):
                    image = pillow.open(io.BytesIO(content), formats=["JPEG"])
                    if image.size != (_SIDE, _SIDE):
                        raise ValueError(f"it has {image.width}×{image.height} pixels")
                    image.load()
                yield name, content

    @contextlib.contextmanager
    def _open(self) -> Iterator[_Files]:
        """Yields the sizes of the files in `train` and `val`, and a function that reads one."""
        with contextlib.ExitStack() as stack:
            sizes, read_bytes = self._open_folder() if self.path.is_dir() else self._open_zip(stack)

            def read(name: str) -> bytes:
                with self._refused(f"is damaged: {name}"):
                    return read_bytes(name)

            yield dict(sorted(sizes.items())), read

    def _open_folder(self) -> _Files:
        def fail(error: OSError) -> None:
            raise error

        with self._refused("can't be read"):
            files = [
                Path(folder, file)
                for part in ("train", "val")
                if (self.path / part).is_dir()
                for folder, _, names in os.walk(self.path / part, onerror=fail, followlinks=True)
                for file in names
            ]
            sizes = {file.relative_to(self.path).as_posix(): file.stat().st_size for file in files}
        return sizes, lambda name: (self.path / name).read_bytes()

    def _open_zip(self, stack: contextlib.ExitStack) -> _Files:
        if not self.path.exists():
            raise InputError(f"data_dir: there is no file {self.path}.")
        if not self.path.is_file():
            raise InputError(f"data_dir: {self.path} should be a regular file.")
        with self._refused("can't be read as a zip archive"):
            archive = stack.enter_context(zipfile.ZipFile(self.path))
        members = {}
        for member in archive.infolist():
            # The names that they have in the folder that is extracted, whatever that is called.
            inside = re.search(r"(?:^|/)((?:train|val)/.*[^/])$", member.filename)
            if inside and not member.filename.startswith("__MACOSX/"):
                members[inside[1]] = member
        sizes = {name: member.file_size for name, member in members.items()}
        return sizes, lambda name: archive.read(members[name])

    def _train_labels(self, names: Iterable[str]) -> dict[str, int]:
        return {
            name: self._label(found[1], f"the folder train/{found[1]}")
            for name in names
            if (found := re.fullmatch(rf"train/([^/]+)/images/{_IMAGE}", name))
        }

    def _validation_labels(
        self, names: Mapping[str, int], read: Callable[[str], bytes]
    ) -> dict[str, int]:
        # The images of all classes lie in one folder: only this file tells the classes apart.
        if _ANNOTATIONS not in names:
            raise self._error(f"has no {_ANNOTATIONS}")
        annotated = {}
        lines = read(_ANNOTATIONS).decode(errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                # The corners of a box follow the two.
                file, class_id = (*line.split("\t"), "")[:2]
                place = f"line {number} of {_ANNOTATIONS}"
                annotated[f"val/images/{file}"] = self._label(class_id, place)
        images = [name for name in names if re.fullmatch(rf"val/images/{_IMAGE}", name)]
        for name in images:
            if name not in annotated:
                raise self._error(f"has {name} without a line in {_ANNOTATIONS}")
        missing = [name for name in annotated if name not in names]
        if images and missing:
            raise self._error(f"lacks {missing[0]}, which has a line in {_ANNOTATIONS}")
        return {name: annotated[name] for name in images}

    def _label(self, class_id: str, place: str) -> int:
        if class_id not in _LABELS:
            raise self._error(
                f"has the unknown class {class_id!r} in {place}; Tiny ImageNet's 200 are WordNet"
                " ids such as 'n01443537'"
            )
        return _LABELS[class_id]

    def _refused(self, problem: str) -> contextlib.AbstractContextManager[None]:
        return refused(f"data_dir: {self.path} {problem}")

    def _error(self, problem: str) -> InputError:
        return InputError(f"data_dir: {self.path} {problem}.")


def notes(counts: Mapping[str, int]) -> list[str]:
    """Returns what a reader of results should know of prepared data with so many examples."""
    if counts == _OFFICIAL:
        return []
    return [
        f"a part of Tiny ImageNet: {counts['train']:,} of {_OFFICIAL['train']:,} training and"
        f" {counts['validation']:,} of {_OFFICIAL['validation']:,} validation images"
    ]


def find(data_dir: AnyPath | None) -> dict[str, Any]:
    """Finds a local copy of Tiny ImageNet, and where the data prepared from it belongs.

    That is the folder that holds the copy. Where it can't be written to, it is TFDS's own default:
    the environment variable `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    `data_dir` may be the official zip archive; the folder that it extracts to; a folder that has
    either under its official name, `tiny-imagenet-200.zip` or `tiny-imagenet-200`; or any other
    folder of TFDS data, where `source` is `None`. Returns the two arguments of `TinyImagenet`.
    """
    if data_dir is None:
        return {"data_dir": None, "source": None}
    # Made absolute first: "." has no parent.
    path = Path(os.path.abspath(os.path.expanduser(data_dir)))
    # The archive first: an extraction may have stopped half-way.
    copies = [copy for copy in (path / f"{_FOLDER}.zip", path / _FOLDER) if copy.exists()]
    is_archive = path.is_file() or (path.suffix.lower() == ".zip" and not path.is_dir())
    if copies:
        source, folder = copies[0], path
    elif is_archive or any((path / part).exists() for part in ("wnids.txt", "train", "val")):
        source, folder = path, path.parent
    else:
        return {"data_dir": str(path), "source": None}
    defaults = (os.environ.get("TFDS_DATA_DIR"), "~/tensorflow_datasets")
    folders = [folder, *(Path(default).expanduser() for default in defaults if default)]
    usable = (folder for folder in folders if _is_usable(folder))
    return {"data_dir": str(next(usable, folder)), "source": Source(source)}


def _is_usable(folder: Path) -> bool:
    if (folder / NAME / str(TinyImagenet.VERSION)).is_dir():
        return True
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)
