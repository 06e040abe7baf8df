"""Runs tune.py and dies at given moments: `python killed_search.py MOMENT,… FLAG…`, for test_tune.

Each moment has a process of its own (see forks.py).

MOMENT is `WHAT:N`, the N-th time in that process that

    step      a training step is done
    trained   a trial's training is done, and not yet reported
    half      half of the search's state is written aside
    saved     the search's state is saved
    ended     a trial's end is saved, and not yet in the results

or `none`, which lets it run.
"""

import collections
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import forks

import tune
from dskd_keras import files, weighting
from dskd_keras.experiment import checkpoints
from dskd_keras.tuning import ranking, search, search_pictures, trials  # noqa: F401

moment = None
counts = collections.Counter()


def reach(what):
    counts[what] += 1
    if moment == f"{what}:{counts[what]}":
        forks.die()


def write(path, data):
    if path.name == "oracle.json":
        aside = path.with_name(f".{path.stem}.1.tmp")
        aside.write_bytes(data[: len(data) // 2])
        reach("half")
        aside.unlink()
    write_bytes(path, data)
    if path.name == "oracle.json":
        reach("saved")


for owner, name, what in (
    (checkpoints.Checkpointer, "on_train_batch_end", "step"),
    (trials.Trials, "on_trial_end", "trained"),
    (ranking, "write_csv", "ended"),
):
    forks.before(owner, name, lambda *_, _what=what, **__: reach(_what))
write_bytes, files.write_bytes = files.write_bytes, write
# They take seconds, in every process.
search_pictures.parameters = search_pictures.progress = lambda results: None


def main(wanted, argv):
    global moment
    moment = wanted
    return tune.main(argv)


# Here Keras imports TensorFlow, where it is installed: once for all the processes.
weighting.get("softmax").get_config()
forks.run(main)
