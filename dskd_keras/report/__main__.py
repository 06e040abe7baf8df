"""Writes the report of run folders: `python -m dskd_keras.report RUN_DIR… [--output FILE]`."""

import sys

from dskd_keras.report.command import main

if __name__ == "__main__":
    sys.exit(main())
