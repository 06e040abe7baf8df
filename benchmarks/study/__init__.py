"""The study: what deep supervision is worth, cell by cell. `python -m benchmarks.study --help`."""
