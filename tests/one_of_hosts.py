"""Runs train.py with tiny models in one of several processes: `one_of_hosts.py STEP FLAG…`.

It dies by SIGKILL in the student's training, after STEP steps of the process; `never` lets it live.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import small
from forks import before, die

import dskd_commands


def prepare():
    """Changes the package, once JAX has joined the others."""
    from dskd_keras.distiller import Distiller
    from dskd_keras.experiment import build, evaluation, pipeline

    build.models.create = small.created
    pipeline.report.write = lambda folders: "no report"
    evaluation._LATENCY_REPETITIONS = 1
    if sys.argv[1] != "never":
        import keras

        def fit(self, *args, callbacks, **kwargs):
            def after(batch, logs):
                if self.teacher is not None and batch + 1 == int(sys.argv[1]):
                    die()

            callbacks.append(keras.callbacks.LambdaCallback(on_train_batch_end=after))

        before(Distiller, "fit", fit)


def main():
    from dskd_keras.experiment import hosts

    join = hosts.join

    def joined(config, backend):
        join(config, backend)
        prepare()

    hosts.join = joined
    return dskd_commands.train(sys.argv[2:])


sys.exit(main())
