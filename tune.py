"""Searches for a distillation's settings: `python tune.py --pair resnet110_resnet32`."""

import sys

from dskd_commands import tune as main

if __name__ == "__main__":
    sys.exit(main())
