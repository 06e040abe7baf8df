"""What a run keeps on disk. Every file is written aside and renamed, so none is ever half there."""

import contextlib
import errno
import json
import os
import tempfile
import warnings
import zipfile
from pathlib import Path

import keras

from dskd_keras import models
from dskd_keras.errors import InputError, TrainingError

# Of PyTorch checkpoints; some projects publish theirs without any.
_TORCH_SUFFIXES = (".pth", ".pt", ".tar", "")
# A member of the .keras archive beside Keras's own, which Keras passes over when it loads.
_NOTES = "dskd_keras.json"


# What a full, broken or vanished disk says.
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ENOENT, errno.ESTALE,
)  # fmt: skip


@contextlib.contextmanager
def disk_errors_in_one_line(folder):
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


def check_writable(field, folder):
    """Creates `folder` and raises `InputError` unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{field}: can't write to '{folder}': {error.strerror}.") from None


def write_text(path, text):
    """Writes a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path, data):
    """Writes a file, whole or not at all."""
    with _written_aside(path) as aside, open(aside, "wb") as file:
        file.write(data)


def remove_leftovers(folder, stem="*"):
    """Removes what a killed process left of files that it was writing aside.

    Args:
        folder: Where, a `pathlib.Path`; nobody else may be writing there.
        stem: Name of the file without its suffix. Defaults to all files.
    """
    for path in folder.glob(f".{stem}.*.tmp*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(field, folder, waiting=None):
    """Keeps other processes from working in a folder; a process that dies lets go of it.

    Where the file system knows no locks there is none.

    Args:
        field: The setting that named the folder, for errors.
        folder: An existing folder.
        waiting: Called without arguments where another process has the folder, and then waited for.
            Defaults to not waiting.

    Raises:
        InputError: Another process has it, and `waiting` is None.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise InputError(
                    f"{field}: another process is working in '{folder}'. Wait for it, or choose "
                    f"another --{field}."
                ) from None
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def save_model(model, path, notes):
    """Saves a model as `.keras` with notes inside.

    The notes are JSON under the name `dskd_keras.json` in the archive, which is a zip file:
    `json.loads(zipfile.ZipFile(path).read("dskd_keras.json"))` reads them anywhere.

    Args:
        model: A Keras model.
        path: A path that ends in `.keras`.
        notes: What to keep beside the weights, a dict that JSON can hold.
    """
    with _written_aside(path, ".keras") as aside:
        model.save(aside)
        with zipfile.ZipFile(aside, "a") as archive:
            archive.writestr(_NOTES, json.dumps(notes, indent=1))


def read_notes(path):
    """Returns the notes that `save_model` put into a file, `{}` where there are none."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(_NOTES)) if _NOTES in archive.namelist() else {}


def load_weights(field, path, architecture):
    """Loads a model's weights.

    Args:
        field: The setting that named the file, for errors.
        path: A `.keras` file of the same architecture, a `.weights.h5`, or a PyTorch checkpoint.
        architecture: The model that takes the weights.

    Raises:
        InputError: The file is missing, of another kind, damaged, or holds another model.
    """
    path = Path(path)
    if path.suffix in _TORCH_SUFFIXES:
        models.load_torch_weights(architecture, path, field=field)
        return
    if not path.name.endswith((".keras", ".weights.h5")):
        raise InputError(
            f"{field}: '{path}' should be a .keras or a .weights.h5 file, or a PyTorch checkpoint "
            f"({', '.join(suffix or 'no suffix' for suffix in _TORCH_SUFFIXES)})."
        )
    if not path.is_file():
        raise InputError(f"{field}: there is no file '{path}'.")
    try:
        if path.suffix == ".keras":
            _check_archive(path)
            loaded = keras.models.load_model(path, compile=False)
        else:
            loaded = architecture
            with warnings.catch_warnings():
                # Keras passes over what the file lacks: those weights would stay random.
                warnings.filterwarnings("error", message="Skipping")
                architecture.load_weights(path)
    except Exception as error:  # Keras, h5py and zipfile raise all kinds for a bad file
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "damaged")
        if reason.startswith("Skipping"):
            reason = "it holds the weights of other layers."
        raise InputError(
            f"{field}: can't load '{path}' for {architecture.name}: {reason}"
        ) from None
    shapes, expected = (
        [tuple(weight.shape) for weight in model.weights] for model in (loaded, architecture)
    )
    if shapes != expected:
        raise InputError(
            f"{field}: '{path}' holds {_describe(loaded)}, where {_describe(architecture)} is "
            "expected."
        )
    if loaded is not architecture:
        architecture.set_weights(loaded.get_weights())


def _describe(model):
    try:
        (inputs,), (outputs,) = model.inputs, model.outputs
    except (AttributeError, TypeError, ValueError):
        return f"a {type(model).__name__} '{model.name}'"
    return f"'{model.name}' from {tuple(inputs.shape[1:])} to {outputs.shape[-1]} classes"


@contextlib.contextmanager
def _written_aside(path, suffix=""):
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


def _check_archive(path):
    """Raises where the file's own checksums don't hold; Keras reads damaged weights silently."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise OSError(f"'{damaged}' in the archive is damaged")
