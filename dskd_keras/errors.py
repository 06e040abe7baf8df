"""The errors that a user can mend, said in one line."""

from collections.abc import Iterable

# A model can have hundreds of layers.
_MOST_CHOICES = 50
# Of a value; a file can be given by mistake where a word is expected.
_MOST_LETTERS = 400


class InputError(ValueError):
    """A setting, a model or a data set that can't be used.

    The message is one line that names the field, its value and what would have been right, so the
    command line prints it alone, without a traceback.
    """


class TrainingError(RuntimeError):
    """A training run that could not go on.

    The message is one line that says where it stopped, why, and what to do, so the command line
    prints it alone, without a traceback.
    """


class ExportError(RuntimeError):
    """A model that could not be exported, or an exported file that gives other logits.

    The message is one line that names the model and the format and says what was seen.
    """


def printable(text: str) -> str:
    """Returns a text in one line, with what a terminal would obey as Python writes it.

    Args:
        text: Any text; bytes that are no UTF-8 may be surrogates in it.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def wrong(field: str, value: object, rule: str) -> InputError:
    """Returns the error for a value that breaks a rule.

    Args:
        field: The field or argument that held the value.
        value: What it held.
        rule: What it should be, such as `"a positive number"`.

    Returns:
        An `InputError`, to be raised by the caller.
    """
    return InputError(f"{field}: {_shown(value)} should be {rule}.")


def unknown_name(field: str, value: object, choices: Iterable[object]) -> InputError:
    """Returns the error for a name that is not among `choices`, close names first.

    Args:
        field: The field or argument that held the name.
        value: What it held.
        choices: All names that would have been right.

    Returns:
        An `InputError`, to be raised by the caller.
    """
    import difflib  # for errors alone

    names = [str(choice) for choice in choices]
    by_folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(str(value).casefold(), list(by_folded), n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(by_folded[name]) for name in close)}?" if close else ""
    shown = ", ".join(names[:_MOST_CHOICES]) or "none"
    if len(names) > _MOST_CHOICES:
        shown += f", … and {len(names) - _MOST_CHOICES} more"
    return InputError(f"{field}: {_shown(value)} should be a known name.{hint} Choices: {shown}.")


def _shown(value: object) -> str:
    text = repr(value)
    if len(text) <= _MOST_LETTERS:
        return text
    return f"{text[: _MOST_LETTERS // 2]}…{text[-_MOST_LETTERS // 4 :]}"


def missing_package(field: str, package: str, extra: str) -> InputError:
    """Returns the error for a package that is needed and not installed.

    Args:
        field: The field, argument or part of the project that needs it.
        package: The package's name.
        extra: The extra of this project that brings it.

    Returns:
        An `InputError`, to be raised by the caller.
    """
    return InputError(
        f"{field}: the package {package} is not installed. Install it with: "
        f"pip install 'dskd-keras[{extra}]'"
    )
