"""How a command ends: its exit status, one line for what went wrong, and where its output goes."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from dskd_keras.errors import ExportError, InputError, TrainingError, printable


def answer(work: Callable[[], object]) -> int:
    """Does a command's work.

    A standard output that is closed, full, or read by nobody any more doesn't stop the work: what
    it makes lies in files.

    Args:
        work: A function without arguments. `SystemExit` goes through.

    Returns:
        The exit status: 0, 1 for work that failed or an output that is full, 2 for a wrong input,
        128 and more for a signal.
    """
    with _lasting_output() as output:
        try:
            status = _status(work)
        except SystemExit:
            if not output.failed():
                raise
            status = 0
        if output.failed():
            status = status or _fail(f"standard output: {output.reason()}.", 1)
    return status


def _status(work: Callable[[], object]) -> int:
    try:
        work()
    except InputError as error:
        return _fail(error, 2)
    except (ExportError, TrainingError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt as interrupt:
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    return 0


def _fail(message: object, status: int) -> int:
    # Names come from anywhere: a terminal shows them and obeys none.
    with contextlib.suppress(OSError):
        print(f"error: {printable(str(message))}", file=sys.stderr)
    return status


class _Output(io.RawIOBase):
    """A file that drops what can't be written, and keeps the first reason."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._error: OSError | None = None

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                raise
            except OSError as error:
                self._error = error
        return len(data)

    def failed(self) -> bool:
        """Returns whether something was lost that somebody may have wanted to read."""
        sys.stdout.flush()
        # The reader of a pipe may have seen enough, as `head` has.
        return self._error is not None and self._error.errno != errno.EPIPE

    def reason(self) -> str:
        """Returns why."""
        return "" if self._error is None else str(self._error.strerror)


@contextlib.contextmanager
def _lasting_output() -> Iterator[_Output]:
    """A context in which standard output never raises an error."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Closed: the next file would get its number, and what libraries print.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    before = sys.stdout
    # Whoever replaced it reads it.
    if before is not sys.__stdout__ or not isinstance(before, io.TextIOWrapper):
        yield _Output(1)
        return
    before.flush()
    output = _Output(before.fileno())
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(output),
        encoding=before.encoding,
        errors="backslashreplace",
        line_buffering=before.line_buffering,
    )
    try:
        yield output
    finally:
        sys.stdout.flush()
        sys.stdout = before
