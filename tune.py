"""Searches for a distillation's settings: `python tune.py --pair resnet110_resnet32`."""

import sys

import train


def main(argv=None):
    """Runs the command and returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return train.run_command("tune.py", argv, _run)


def _run(config_of, argv, command):
    from dskd_keras.config import SearchConfig
    from dskd_keras.tuning import search

    search.run(
        config_of(SearchConfig), command=command, worker_command=[sys.executable, __file__, *argv]
    )


if __name__ == "__main__":
    sys.exit(main())
