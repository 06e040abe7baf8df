"""What the sources of images share: packages that may be missing, failures, threads."""

import contextlib
import importlib
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dskd_keras.errors import InputError, missing_package

AnyPath = str | os.PathLike[str]
_T = TypeVar("_T")


def needed(module: str, package: str, extra: str = "train") -> Any:
    """Returns a module, or raises `InputError` where the package that brings it isn't installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_package("dataset", package, extra) from error


@contextlib.contextmanager
def refused(problem: str, errors: type[Exception] = Exception, remedy: str = "") -> Iterator[None]:
    """Turns a library's errors into an `InputError`: `PROBLEM (the error)REMEDY.`

    By default all kinds: broken data leads decoders and archives to many.
    """
    try:
        yield
    except InputError:
        raise
    except errors as error:
        raise InputError(f"{problem} ({one_line(error)}){remedy}.") from error


def one_line(error: Exception) -> str:
    """Returns an error's message in one line of at most 300 characters, or its type without one."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__


def in_threads(work: Callable[[_T], None], items: Iterable[_T]) -> None:
    """Does some work on each item, several at once, and raises the first error."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(work, items):
            pass
