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
    """Returns a module of a package that may not be installed.

    Args:
        module: The module's name.
        package: The package that it comes with.
        extra: The extra of this project that brings the package.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_package("dataset", package, extra) from error


@contextlib.contextmanager
def refused(problem: str, errors: type[Exception] = Exception, remedy: str = "") -> Iterator[None]:
    """A context that turns errors of a library into an `InputError`.

    Args:
        problem: What the message begins with; the error follows in brackets.
        errors: Which. Defaults to all: broken data leads decoders and archives to many.
        remedy: What the message ends with.
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
