"""The same numbers on one device and on two, each seen in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

SCRIPT = """
import json, sys
devices = int(sys.argv[1])
import keras
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    names = [f"CPU:{i}" for i in range(devices)]
    scope = tf.distribute.MirroredStrategy(names).scope()
else:
    import contextlib, jax
    scope = contextlib.nullcontext()
    assert len(jax.devices()) == devices
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=jax.devices()))
import numpy as np
import dskd_keras, small
keras.utils.set_random_seed(0)
with scope:
    l2 = keras.regularizers.L2(0.01)
    distiller = dskd_keras.Distiller(
        small.convnet("teacher"),
        small.convnet("student", batch_norm=False, regularizer=l2),
        ["stage1", "stage2"],
    )
    distiller.compile(keras.optimizers.SGD(0.1), loss=small.crossentropy(), metrics=["accuracy"])
# Both halves of a batch hold the same images, so that the heads' batch norm sees the same on one
# device and on two; the weights differ, so that the halves' losses do.
x, y = small.images(4)
x, y = np.concatenate([x, x]), np.concatenate([y, y])
weight = np.repeat([0.5, 2.0], 4).astype("float32")
history = distiller.fit(
    x, y, sample_weight=weight, batch_size=8, epochs=3, shuffle=False, verbose=0
).history
print(json.dumps(history))
"""


def history(devices):
    here = Path(__file__).parent
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "XLA_FLAGS": flags,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(devices)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras leaves it to the user there")
def test_two_devices_train_as_one_does():
    one, two = history(1), history(2)
    assert set(one) == set(two)
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-4), name
