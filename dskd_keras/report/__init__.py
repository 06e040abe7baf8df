"""What a run leaves to be read: its results, the table of them, pictures and a page.

`python -m dskd_keras.report RUN_DIR…` makes all of it from the files of run folders alone, so that
it can be repeated at any time, also while a run goes on or after it was interrupted. It needs no
Keras.
"""

from typing import TYPE_CHECKING

from dskd_keras._lazy import attach

if TYPE_CHECKING:
    from dskd_keras.report.page import write
    from dskd_keras.report.run_result import RunResult
    from dskd_keras.report.table import console, gained, results_table

__all__ = ["RunResult", "console", "gained", "results_table", "write"]

_HOMES = {
    "RunResult": "run_result",
    "console": "table",
    "gained": "table",
    "results_table": "table",
    "write": "page",
}
__getattr__, __dir__ = attach(__name__, _HOMES)
