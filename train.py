"""Distills a teacher into a student: `python train.py --pair resnet110_resnet32`."""

import os
import sys
from pathlib import Path

# TensorFlow greets with a dozen lines about the processor; they would bury the first error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from dskd_keras.config import ExperimentConfig, parse
from dskd_keras.errors import InputError


def main(argv=None):
    """Runs the command and returns its exit status."""
    try:
        config = parse(
            ExperimentConfig,
            sys.argv[1:] if argv is None else argv,
            configs=Path(__file__).parent / "configs",
            command="train.py",
        )
        from dskd_keras import experiment

        experiment.run(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
