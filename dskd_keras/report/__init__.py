"""What a run leaves to be read: its results, the table of them, pictures and a page.

`python -m dskd_keras.report RUN_DIR…` makes all of it from the files of run folders alone, so that
it can be repeated at any time, also while a run goes on or after it was interrupted.
"""

from dskd_keras.report.page import write
from dskd_keras.report.results import RunResult, console, results_table

__all__ = ["RunResult", "console", "results_table", "write"]
