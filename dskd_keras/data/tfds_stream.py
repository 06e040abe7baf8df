"""Sets of TensorFlow Datasets, left in their files: any image can be read at any time.

TFDS itself reads a set so where it is prepared as ArrayRecords. In TFRecords, its usual form, the
places of the images are looked up once and kept. TensorFlow is not needed.
"""

import hashlib
import io
import os
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorflow_datasets as tfds

from dskd_keras import files
from dskd_keras.data import streams
from dskd_keras.data.reading import refused
from dskd_keras.errors import InputError

# Part of a kept index's name: to be raised when what it holds changes.
_VERSION = 1
# A TFRecord: the length as uint64, its checksum, the bytes, their checksum.
_LENGTH, _CHECKSUM = struct.Struct("<Q"), 4


class _Records:
    """Encoded images of a random-access source of TFDS."""

    def __init__(self, source: Any, key: str, place: str, version: str) -> None:
        self._source, self._key, self._place, self._version = source, key, place, version

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return f"example {index} of {self._place}"

    def open(self, index: int) -> BinaryIO:
        return io.BytesIO(self._source[int(index)][self._key])

    def identity(self) -> bytes:
        return self._version.encode()


def has_labels(builder: tfds.core.DatasetBuilder, split: str) -> bool:
    """Returns whether a split has labels."""
    _, label_key = builder.info.supervised_keys
    return int(next(_examples(builder, split))[2][label_key]) >= 0


def read(
    name: str, builder: tfds.core.DatasetBuilder, split: str, image_size: int | None
) -> tuple[streams.ImageStream, np.ndarray]:
    """Returns a stream `[N, H, W, C]` and the labels, int32 `[N]`, of one split, in stored order.

    Raises:
        InputError: A file is damaged, or the images differ in size and are not resized.
    """
    image_key, _ = builder.info.supervised_keys
    count = builder.info.splits[split].num_examples
    index = _index(builder, split)
    if len(index["labels"]) != count:
        raise InputError(
            f"dataset: {name!r} in {builder.data_dir} has {len(index['labels'])} of {count} images"
            f" in {split!r}; remove that folder and prepare it again."
        )
    if _random_access(builder):
        place = f"{split!r} of {name!r}"
        encoded: streams.Encoded = _Records(
            _source(builder, split), image_key, place, _identity(builder, split)
        )
    else:
        encoded = streams.EncodedParts(
            _paths(builder, split), index["which"], index["offsets"], index["sizes"]
        )
    channels = builder.info.features[image_key].shape[2] or 3
    return streams.open_stream(encoded, image_size, channels), index["labels"]


def _index(builder: tfds.core.DatasetBuilder, split: str) -> dict[str, np.ndarray]:
    """Returns the labels of all images and their places: read from the cache, else from all files.

    A cache that can't be written is gone without.
    """
    kept = _cache_folder() / f"{builder.name}-{split}-{_identity(builder, split)}.npz"
    try:
        with np.load(kept) as content:
            return dict(content)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there yet, or damaged
        pass
    _, label_key = builder.info.supervised_keys
    count = builder.info.splits[split].num_examples
    print(f"Looking {count:,} images of {split!r} up in {builder.data_dir}", file=sys.stderr)
    columns: dict[str, list[int]] = {"which": [], "offsets": [], "sizes": [], "labels": []}
    with refused(
        f"dataset: {builder.data_dir} can't be read",
        remedy="; remove that folder and prepare it again",
    ):
        for which, place, example in _examples(builder, split):
            for column, value in zip(columns, (which, *place, example[label_key]), strict=True):
                columns[column].append(int(value))
    types = {"which": np.int32, "labels": np.int32}
    index = {name: np.array(values, types.get(name, np.int64)) for name, values in columns.items()}
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **index)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(kept, content.getvalue())
    except OSError:
        pass
    return index


def _examples(
    builder: tfds.core.DatasetBuilder, split: str
) -> Iterator[tuple[int, tuple[int, int], dict[str, Any]]]:
    """Yields each example with the number of its file, and its image's offset and size there."""
    image_key, _ = builder.info.supervised_keys
    if _random_access(builder):
        for example in _source(builder, split):
            yield 0, (0, len(example[image_key])), example
        return
    features = builder.info.features
    undecoded = {image_key: tfds.decode.SkipDecoding()}
    for which, path in enumerate(_paths(builder, split)):
        with open(path, "rb") as file:
            while header := file.read(_LENGTH.size + _CHECKSUM):
                start = file.tell()
                (length,) = _LENGTH.unpack(header[: _LENGTH.size])
                record = file.read(length)
                if len(record) != length or len(file.read(_CHECKSUM)) != _CHECKSUM:
                    raise ValueError(f"{path} ends within a record")
                example = features.deserialize_example_np(record, decoders=undecoded)
                image = example[image_key]
                yield which, (start + record.index(image), len(image)), example


def _random_access(builder: tfds.core.DatasetBuilder) -> bool:
    formats = tfds.core.FileFormat.with_random_access()
    return bool(builder.info.available_file_formats() & formats)


def _source(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    image_key, _ = builder.info.supervised_keys
    return builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})


def _paths(builder: tfds.core.DatasetBuilder, split: str) -> list[str]:
    return [str(part.filename) for part in builder.info.splits[split].file_instructions]


def _identity(builder: tfds.core.DatasetBuilder, split: str) -> str:
    """Returns a hex string that stands for the files of a split, wherever they lie."""
    info, digest = builder.info, hashlib.blake2b(digest_size=8)
    digest.update(
        repr((_VERSION, info.full_name, split, info.splits[split].shard_lengths)).encode()
    )
    for path in map(Path, _paths(builder, split)):
        digest.update(repr((path.name, path.stat().st_size)).encode())
    return digest.hexdigest()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dskd_keras"
