"""The errors that a user can mend, said in one line."""

import difflib
from collections.abc import Iterable

# A model can have hundreds of layers.
_MOST_CHOICES = 50


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


def unknown_name(field: str, value: object, choices: Iterable[str]) -> InputError:
    """Returns the error for a name that is not among `choices`, close names first.

    Args:
        field: The field or argument that held the name.
        value: What it held.
        choices: All names that would have been right.

    Returns:
        An `InputError`, to be raised by the caller.
    """
    choices = [str(choice) for choice in choices]
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(str(value).casefold(), list(by_folded), n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(by_folded[name]) for name in close)}?" if close else ""
    shown = ", ".join(choices[:_MOST_CHOICES]) or "none"
    if len(choices) > _MOST_CHOICES:
        shown += f", … and {len(choices) - _MOST_CHOICES} more"
    return InputError(f"{field}: unknown name {value!r}.{hint} Choices: {shown}.")
