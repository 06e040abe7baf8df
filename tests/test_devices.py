"""The same numbers on one device and on two, but for rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import dskd_keras
from dskd_keras.experiment import devices
from dskd_keras.experiment.config import ExperimentConfig

HERE = Path(__file__).parent
BACKEND = keras.backend.backend()
several = pytest.mark.skipif(BACKEND == "torch", reason="Keras distributes nothing there")
# Two devices add in another order, which costs about 1e-7 of a number, and TensorFlow's replicas
# take E x² − (E x)² for the variance. A step passes on what the one before it left. Batch
# statistics of half a batch, or a mean of unequal halves' means, are apart in the second digit.
CLOSE = {"rtol": 5e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the script has seen, in a process with two devices."""
    folder = tmp_path_factory.mktemp("devices")
    done = subprocess.run(
        [sys.executable, str(HERE / "on_two_devices.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text()) | {"said": done.stdout}


def assert_close(one, two):
    assert one.keys() == two.keys() and len(one) > 30
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, **CLOSE, err_msg=name)


PAIRS = [("one", "two"), ("one, divided", "user's"), ("one, divided", "model parallel")]


@several
@pytest.mark.parametrize("one, two", PAIRS if BACKEND == "jax" else PAIRS[:1])
def test_two_devices_train_as_one_does(found, one, two):
    assert_close(found[one], found[two])
    # The weights were trained, and the allocation is none that any losses would have given.
    name = "step: deep_feature_allocation/stage1"
    assert np.ptp(found[one][name]) > 20 * CLOSE["rtol"]


@several
def test_a_run_goes_on_with_another_number_of_devices(found):
    # Stopped within an epoch on two, between two epochs on one, and ended on two, with the images
    # on both. TensorFlow's replicas take steps one by one.
    refused = [2] if BACKEND == "tensorflow" else []
    assert found["status"] == [0, 143, 143, *refused, 0]
    assert "Continuing after epoch 0 of 2, step 2 of 3" in found["said"]
    assert "Continuing after epoch 1 of 2." in found["said"]
    assert_close(found["run on one"], found["run on two"])
    names = ("loss", "deep_feature_loss")
    epochs = [len(found["run on two"][f"history: {name}"]) for name in names]
    assert epochs == [2, 1], "the second epoch has no heads"
    assert found["run on two"]["synchronized"] == [0.0], "no other backend could load it"


@several
def test_devices_that_can_not_be_used_are_refused(found):
    too_many, batch_size, last_batch, *right, over_batch = found["refused"]
    assert too_many == "devices: 3 should be at most 2, as many as there are, or all."
    assert batch_size == (
        "batch_size: 5, but 2 devices share every batch. Take a multiple of 2, such as 4 or 6."
    )
    if BACKEND == "jax":
        assert last_batch is None
    else:
        assert last_batch == (
            "batch_size: 8, but on TensorFlow the first batch of 17 training images has to divide "
            "among 2 devices, and the last one to have an image for each. Take 10 or 6 or 12 or 14."
        )
    assert right == [None, last_batch]
    if BACKEND == "jax":
        assert over_batch is None
    else:
        assert over_batch.startswith("prediction_loss: dist, but it compares the images of a batch")


@pytest.mark.once
def test_pytorch_trains_on_one_device():
    config = ExperimentConfig("resnet8", "resnet8", devices="all")
    with pytest.raises(dskd_keras.InputError, match=r"^devices: all, but Keras distributes noth"):
        devices.find(config)
