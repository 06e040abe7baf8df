"""Files that are whole or not there: each is written aside and renamed."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dskd_keras.errors import InputError, TrainingError

# What a full, broken or vanished disk says.
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOENT, errno.ESTALE,
)  # fmt: skip


@contextlib.contextmanager
def disk_errors_in_one_line(folder: Path) -> Iterator[None]:
    """Says what a disk says as a `TrainingError`, for work in `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise TrainingError(
            f"can't write to '{folder}': {error.strerror}. What was saved is still there; --resume "
            "goes on from it."
        ) from error


def check_writable(field: str, folder: Path) -> None:
    """Creates `folder` and raises `InputError` unless files can be written there.

    Args:
        field: The setting that named the folder, for the error.
        folder: The folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{field}: can't write to '{folder}': {error.strerror}.") from None


def read_text(field: str, path: Path, most_bytes: int) -> str:
    """Returns what a text file holds.

    Args:
        field: What an error calls the file.
        path: The file.
        most_bytes: What it may have at most.

    Raises:
        InputError: It can't be read, is larger, or no file of text.
    """
    try:
        # A pipe may never end, nor may a device.
        if path.exists() and not path.is_file():
            raise InputError(f"{field}: '{path}' should be a regular file.")
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise InputError(f"{field}: can't read '{path}': {error.strerror}.") from None
    if len(content) > most_bytes:
        raise InputError(f"{field}: '{path}' should be a file of at most {most_bytes:,} bytes.")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InputError(f"{field}: '{path}' should be a text file.") from None


def read_json(field: str, path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Args:
        field: The setting that named the file's folder, for the error.
        path: The file.

    Raises:
        InputError: It can't be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{field}: can't read '{path}': {error.strerror}.") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise damaged(field, path)
    return values


def damaged(field: str, path: Path) -> InputError:
    """Returns the error for a file that this project wrote, and that holds something else now."""
    return InputError(f"{field}: '{path}' is damaged. Choose another --{field}.")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    with written_aside(path) as aside, open(aside, "wb") as file:
        file.write(data)


def remove_leftovers(folder: Path, stem: str = "*") -> None:
    """Removes what a killed process left of files that it was writing aside.

    Args:
        folder: Where; nobody else may be writing there.
        stem: Name of the file without its suffix. Defaults to all files.
    """
    for path in folder.glob(f".{stem}.*.tmp*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def written_aside(path: Path, suffix: str = "") -> Iterator[Path]:
    """A context that gives another path to write to, and renames it to `path` at its end.

    Args:
        path: Where the file is to be.
        suffix: What the other path has to end in. Defaults to nothing.
    """
    # The process is in the name: two of them may write the same file at once.
    aside = path.with_name(f".{path.stem}.{os.getpid()}.tmp{suffix}")
    try:
        yield aside
        # On the disk before the old file goes: a machine that loses power keeps one of the two.
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
