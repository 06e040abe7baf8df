"""Images that stay in their files and are decoded when they are asked for. Without Keras."""

import contextlib
import hashlib
import io
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from dskd_keras import checks
from dskd_keras.data import pixels
from dskd_keras.data.reading import in_threads, needed, refused
from dskd_keras.errors import InputError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# A stream is chosen by itself for images that would take more than this share of the memory.
MEMORY_SHARE = 0.25
_MOST_WORKERS = 16
_IMAGES_A_TASK = 64


class Encoded(Protocol):
    """Where encoded images lie. What implements it can be sent to another process."""

    def __len__(self) -> int:
        """Returns their number."""

    def name(self, index: int) -> str:
        """Returns what messages call one of them."""

    def open(self, index: int) -> BinaryIO:
        """Returns the encoded image, as a file at its beginning."""

    def identity(self) -> bytes:
        """Returns what stands for all of them and changes with them."""


class EncodedFiles:
    """Images with a file each.

    Their names are kept in one string, since a million paths as objects take half a gigabyte.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        names = [os.fsencode(file) for file in files]
        self._ends = np.cumsum([len(name) for name in names])
        self._names = b"".join(names)

    def __len__(self) -> int:
        """Returns the number of files."""
        return len(self._ends)

    def name(self, index: int) -> str:
        """Returns the path."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._names[start : self._ends[index]])

    def open(self, index: int) -> BinaryIO:
        """Returns the file. Raises `InputError` for what is none, such as a pipe."""
        path = self.name(index)
        # Opening a pipe would wait for whoever writes to it.
        if not os.path.isfile(path):
            raise InputError(f"dataset: {path} is no regular file.")
        return open(path, "rb")

    def identity(self) -> bytes:
        """Returns the names of the files, with their folders, and their sizes."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(len(self)):
            path = Path(self.name(index))
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
        return digest.digest()


class EncodedParts:
    """Images that lie one after another in a few files.

    Args:
        files: Paths.
        which: For each image the number of its file, int `[N]`.
        offsets: Its first byte there, int64 `[N]`.
        sizes: Its size in bytes, int64 `[N]`.
    """

    def __init__(
        self, files: Sequence[str], which: np.ndarray, offsets: np.ndarray, sizes: np.ndarray
    ) -> None:
        self._files = list(files)
        self._which, self._offsets, self._sizes = which, offsets, sizes
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._which)

    def name(self, index: int) -> str:
        """Returns the place in its file."""
        return f"the image at byte {self._offsets[index]} of {self._files[self._which[index]]}"

    def open(self, index: int) -> BinaryIO:
        """Returns the part of the file."""
        number = int(self._which[index])
        with self._lock:
            if number not in self._descriptors:
                self._descriptors[number] = os.open(self._files[number], os.O_RDONLY)
        place = int(self._sizes[index]), int(self._offsets[index])
        return io.BytesIO(os.pread(self._descriptors[number], *place))

    def identity(self) -> bytes:
        """Returns the names of the files and the place of each image in them."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr([Path(file).name for file in self._files]).encode())
        for places in (self._which, self._offsets, self._sizes):
            digest.update(places.astype("<i8").tobytes())
        return digest.digest()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what another process needs: it opens the files itself."""
        return self.__dict__ | {"_lock": None, "_descriptors": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what `__getstate__` gave."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __del__(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class ImageStream:
    """Images in files, to be used as an array uint8 `[N, H, W, C]`: `stream[indices]` decodes some.

    What it holds is where they are: about 50 bytes an image.

    Args:
        encoded: Where they lie.
        shape: `(H, W, C)`.
        resizes: Whether images of another size are resized. They are refused otherwise, when they
            are decoded.
        chosen: Indices of those images that belong to it, `[N]`. Defaults to all.
        workers: Processes that make the batches of it ahead; 0 takes threads of this process.
            Defaults to one less than there are cores, and at most 16.
    """

    ndim = 4
    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        encoded: Encoded,
        shape: tuple[int, int, int],
        resizes: bool,
        chosen: np.ndarray | None = None,
        workers: int | None = None,
    ) -> None:
        self.workers = default_workers() if workers is None else checks.whole("workers", workers, 0)
        self._encoded = encoded
        self._resizes = resizes
        self._chosen = np.arange(len(encoded)) if chosen is None else chosen
        self.shape = (len(self._chosen), *shape)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._chosen)

    def __getitem__(self, chosen: np.ndarray | slice) -> np.ndarray:
        """Returns images, uint8 `[B, H, W, C]`.

        Raises:
            InputError: A file is no image, or is one of another size.
        """
        images = [self._fitted(index) for index in self._chosen[chosen]]
        return np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)

    def originals(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Returns images as they are stored, uint8 `[*, *, C]` each."""
        return [self._decode(index) for index in self._chosen[chosen]]

    def subset(self, chosen: np.ndarray) -> "ImageStream":
        """Returns a stream of some images."""
        part = self._chosen[chosen]
        return ImageStream(self._encoded, self.shape[1:], self._resizes, part, self.workers)

    def identity(self) -> bytes:
        """Returns what stands for the images without decoding them: their names and sizes."""
        chosen = hashlib.blake2b(self._chosen.astype("<i8").tobytes(), digest_size=16)
        return self._encoded.identity() + chosen.digest()

    def _fitted(self, index: int) -> np.ndarray:
        image = self._decode(index)
        shape = self.shape[1:]
        if self._resizes:
            return pixels.resize(image, shape[:2])
        if image.shape != shape:
            raise different_sizes("the first one", shape, self._encoded.name(index), image.shape)
        return image

    def _decode(self, index: int) -> np.ndarray:
        with self._encoded.open(index) as file:
            return decode(file, self._encoded.name(index), self.shape[3])


def decode(file: BinaryIO, name: str, channels: int = 3) -> np.ndarray:
    """Returns an image, uint8 `[H, W, C]`, by Pillow; of one channel, three or four.

    Raises:
        InputError: It is none, or has more than 8 bits a channel.
    """
    pillow = needed("PIL.Image", "pillow")
    with refused(f"dataset: {name} can't be read as an image"), pillow.open(file) as image:
        if image.mode.startswith(("I", "F")):
            # Pillow would clip these to white on the way to RGB.
            raise ValueError("it has more than 8 bits a channel")
        decoded = np.asarray(image.convert(_MODES[channels]))
        return decoded.reshape(*decoded.shape[:2], channels)


def default_workers() -> int:
    """Returns a number of processes: a core is left to the model, and 16 are enough for most."""
    return max(1, min(_MOST_WORKERS, cores() - 1))


def cores() -> int:
    """Returns how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def open_stream(encoded: Encoded, image_size: int | None, channels: int = 3) -> ImageStream:
    """Returns a stream of encoded images, resized to `image_size` where it is given.

    Raises:
        InputError: It is not given, and the images differ in size: all their headers are read.
    """
    if image_size:
        return ImageStream(encoded, (image_size, image_size, channels), True)
    shape = (*_height_and_width(encoded, 0), channels)

    def check_some(start: int) -> None:
        for index in range(start, min(start + _IMAGES_A_TASK, len(encoded))):
            if (found := _height_and_width(encoded, index)) != shape[:2]:
                raise different_sizes(encoded.name(0), shape, encoded.name(index), found)

    in_threads(check_some, range(0, len(encoded), _IMAGES_A_TASK))
    return ImageStream(encoded, shape, False)


def _height_and_width(encoded: Encoded, index: int) -> tuple[int, int]:
    pillow = needed("PIL.Image", "pillow")
    problem = f"dataset: {encoded.name(index)} can't be read as an image"
    with encoded.open(index) as file, refused(problem), pillow.open(file) as image:
        return image.height, image.width


def different_sizes(
    first: str, first_shape: Sequence[int], name: str, shape: Sequence[int]
) -> InputError:
    """Returns the error for an image that has not the size of the first one."""
    return InputError(
        f"dataset: images differ in size: {first} has {first_shape[1]}×{first_shape[0]} pixels and"
        f" {name} has {shape[1]}×{shape[0]}; pass --image_size to resize all of them."
    )


def is_wanted(stream: bool | None, count: int, shape: Sequence[int]) -> tuple[bool, list[str]]:
    """Returns whether so many images of a shape are to be a stream, and the note that says so.

    `None` leaves it to the memory: a stream is taken for images that need more than a quarter.
    """
    size, memory = count * math.prod(shape), memory_bytes()
    if stream is not None or memory is None or size <= MEMORY_SHARE * memory:
        return bool(stream), []
    return True, [
        f"streamed: the images would take {size / 2**30:.1f} of {memory / 2**30:.1f} GiB of memory "
        "(--stream false to hold them all the same)"
    ]


def memory_bytes() -> int | None:
    """Returns this machine's memory, or what its container may take; None where neither is told."""
    sizes = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    # Outside of a container it is not there, and without a limit it says "max".
    with contextlib.suppress(OSError, ValueError):
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(sizes, default=None)
