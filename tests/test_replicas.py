"""The same numbers on one device and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

SCRIPT = """
import contextlib, json, keras
import numpy as np
import dskd_keras, small

def two_devices():
    if keras.backend.backend() == "tensorflow":
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    assert len(jax.devices()) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=jax.devices()))
    return contextlib.nullcontext()

def history(scope):
    global distiller, x, y, weight
    keras.utils.set_random_seed(0)
    with scope:
        l2 = keras.regularizers.L2(0.01)
        distiller = dskd_keras.Distiller(
            small.convnet("teacher"),
            small.convnet("student", batch_norm=False, regularizer=l2),
            ["stage1", "stage2"],
        )
        distiller.compile(keras.optimizers.SGD(0.1), small.crossentropy(), metrics=["accuracy"])
    # Both halves of a batch hold the same images, so that the heads' batch norm sees the same on
    # one device and on two; the weights differ, so that the halves' losses do.
    x, y = small.images(4)
    x, y = np.concatenate([x, x]), np.concatenate([y, y])
    weight = np.repeat([0.5, 2.0], 4).astype("float32")
    return distiller.fit(
        x, y, sample_weight=weight, batch_size=8, epochs=3, shuffle=False, verbose=0
    ).history

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
else:
    import jax
one, two = history(contextlib.nullcontext()), history(two_devices())

# One more step on two devices, of other images in either half.
x, y = small.images(8, seed=1)
expected = float(small.crossentropy()(y, distiller.student(x)))
found = []
callback = keras.callbacks.LambdaCallback(
    on_train_batch_end=lambda batch, logs: found.append(distiller.step_terms()["label_loss"])
)
distiller.fit(
    x, y, sample_weight=np.ones_like(weight), batch_size=8, verbose=0, callbacks=[callback]
)
print(json.dumps({"one": one, "two": two, "step": found, "expected": expected}))
"""


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras leaves it to the user there")
def test_two_devices_train_as_one_does():
    here = Path(__file__).parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {
        **os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "XLA_FLAGS": flags,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    one, two = answers["one"], answers["two"]
    assert set(one) == set(two)
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-4), name
    assert answers["step"] == pytest.approx([answers["expected"]], rel=1e-5)
