"""Texts as cells of CSV files, which spreadsheets and terminals show and don't run."""

from dskd_keras.errors import printable

# What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@")


def shown(text: str) -> str:
    """Returns a text as a cell: after an apostrophe where it looks like a formula.

    What can't be printed, such as a terminal's escape characters, is written as Python writes it.
    """
    text = printable(text)
    return f"'{text}" if text.lstrip("' ").startswith(_FORMULA) else text


def read(cell: str) -> str:
    """Returns the text that `shown` wrote, but for what can't be printed."""
    return cell[1:] if cell.startswith("'") and cell.lstrip("' ").startswith(_FORMULA) else cell
