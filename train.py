"""Distills a teacher into a student: `python train.py --pair resnet110_resnet32`."""

import sys

from dskd_commands import train as main

if __name__ == "__main__":
    sys.exit(main())
