"""The commands' way in: it keeps Keras from being imported before they have read their flags."""

import os
import sys

os.environ["DSKD_KERAS_DEFER"] = "1"
import dskd_keras  # noqa: F401

# The variable is this import's alone: what these commands start imports the package as usual.
del os.environ["DSKD_KERAS_DEFER"]
from dskd_keras import startup
from dskd_keras.commands import report, train, tune

__all__ = ["report", "startup", "train", "tune"]

if __name__ == "__main__":  # as a search starts its workers
    sys.exit(globals()[sys.argv.pop(1)]())
