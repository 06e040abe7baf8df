"""Reads an epoch of a folder within a limit of memory; for `benchmarks.stream`.

python -m benchmarks.stream_epoch FOLDER IMAGE_SIZE WORKERS LIMIT_MIB True|False
"""

import resource
import sys
import time

_MEBIBYTE = 2**20


def main(folder, image_size, workers, limit_mib, stream):
    """Reads all training batches, and says how long that took and what it allocated."""
    # Keras and its backend are not what is looked at: they are there before the limit.
    from dskd_keras import data

    limit = int(limit_mib) * _MEBIBYTE + _allocated()
    # What the kernel counts for it is memory of the process's own, and not the pages of files.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = _allocated()
    dataset = data.load(
        folder, image_size=int(image_size), stream=stream == "True", stream_workers=int(workers)
    )
    batches = data.TrainingBatches(
        dataset.x_train, dataset.y_train, 64, 0, dataset.mean, dataset.std, dataset.augmentation
    )
    begin, most = time.perf_counter(), 0
    for step in range(batches.steps_per_epoch):
        batches[step]
        most = max(most, _allocated() - before)
    seconds = time.perf_counter() - begin
    print(
        f"an epoch of {len(dataset.x_train):,} images in {seconds:.0f} s; {most / _MEBIBYTE:,.0f} "
        "MiB at most beside Keras, in the process that trains"
    )


def _allocated():
    """Returns the memory of this process's own in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmData")


if __name__ == "__main__":
    main(*sys.argv[1:])
