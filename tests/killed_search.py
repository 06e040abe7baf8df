"""Runs tune.py and dies at given moments: `python killed_search.py MOMENT,… FLAG…`, for test_tune.

Each moment has a process of its own, forked from this one once the backend is imported. The first
that does not die by SIGKILL ends it, with its exit status. With EAGERLY=1 in the environment
TensorFlow compiles nothing.

MOMENT is `WHAT:N`, the N-th time in that process that

    step      a training step is done
    trained   a trial's training is done, and not yet reported
    half      half of the search's state is written aside
    saved     the search's state is saved
    ended     a trial's end is saved, and not yet in the results

or `none`, which lets it run.
"""

import collections
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tune
from dskd_keras import artifacts, checkpoints
from dskd_keras.tuning import results, search, trials  # noqa: F401

if os.environ.get("EAGERLY"):
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)

moment = None
counts = collections.Counter()


def reach(what):
    counts[what] += 1
    if moment == f"{what}:{counts[what]}":
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, what):
    """Reaches `what` before `owner.name` is called."""
    function = getattr(owner, name)

    def hooked(*args, **kwargs):
        reach(what)
        return function(*args, **kwargs)

    setattr(owner, name, hooked)


def write(path, data):
    if path.name == "oracle.json":
        aside = path.with_name(f".{path.stem}.1.tmp")
        aside.write_bytes(data[: len(data) // 2])
        reach("half")
        aside.unlink()
    write_bytes(path, data)
    if path.name == "oracle.json":
        reach("saved")


before(checkpoints.Checkpointer, "on_train_batch_end", "step")
before(trials.Trials, "on_trial_end", "trained")
before(results, "write_csv", "ended")
write_bytes, artifacts.write_bytes = artifacts.write_bytes, write

for number, moment in enumerate(sys.argv[1].split(",")):
    process = os.fork()
    if not process:
        status = tune.main(sys.argv[2:])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status != -signal.SIGKILL:
        print(f"{number} killed, then {moment} ended with {status}")
        sys.exit(status)
sys.exit(f"all {number + 1} killed")
