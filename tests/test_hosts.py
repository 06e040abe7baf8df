"""Two processes that train together give what one gives, and one that is killed ends both."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import dskd_keras
from dskd_keras.experiment import hosts
from dskd_keras.experiment.config import ExperimentConfig

HERE = Path(__file__).parent
BACKEND = keras.backend.backend()
# A killed process is noticed by its closed connections, or else by the missing heartbeat.
AT_MOST = 60


def start(folder, run, step, **variables):
    """Starts train.py, which dies after a step, or never does."""
    return subprocess.Popen(
        [
            sys.executable, str(HERE / "one_of_hosts.py"), str(step), "--teacher", "resnet8",
            "--student", "resnet8", "--dataset", str(folder / "noise.npz"), "--epochs", "2",
            "--batch_size", "8", "--teacher_epochs", "1", "--checkpoint_steps", "1", "--resume",
            "--run_dir", str(folder / run), "--teacher_dir", str(folder / run / "teachers"),
            "--devices", "all",
        ],
        env={**os.environ, "PYTHONPATH": str(HERE), "XLA_FLAGS": "", **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def both(folder, killed=(None, None)):
    """Runs two processes on the loopback; returns their statuses, outputs and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        start(
            folder, "two", killed[index] or "never", JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]  # fmt: skip
    if any(killed):
        processes[killed[0] is None].wait()
        ended = time.monotonic()
        processes[killed[0] is not None].wait(AT_MOST)
        assert time.monotonic() - ended < AT_MOST
    said = [process.communicate() for process in processes]
    return [process.returncode for process in processes], said


def outcome(folder):
    run = folder / "dskd" / "seed-0"
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    student = keras.models.load_model(run / "student.keras", compile=False)
    return {
        "accuracy": json.loads((run / "metrics.json").read_text())["test_accuracy"],
        **{name: [float(row[name]) for row in rows] for name in rows[0]},
        **{w.path: v for w, v in zip(student.weights, student.get_weights(), strict=True)},
    }


@pytest.mark.skipif(BACKEND != "jax", reason="Keras trains in several processes on JAX alone")
def test_two_processes_train_as_one_does_and_go_on_after_one_was_killed(tmp_path):
    rng = np.random.default_rng(0)
    # 8, 8 and 5 images a batch: each process reads four, and all of the last one.
    np.savez(
        tmp_path / "noise.npz", x_train=rng.integers(0, 256, (21, 8, 8, 3), "uint8"),
        y_train=np.arange(21, dtype="uint8") % 3, y_test=np.arange(13, dtype="uint8") % 3,
        x_test=rng.integers(0, 256, (13, 8, 8, 3), "uint8"),
    )  # fmt: skip
    alone = start(tmp_path, "one", "never")
    statuses, (leader, _) = both(tmp_path, killed=(None, 2))
    assert statuses == [1, -signal.SIGKILL]
    (line,) = (line for line in leader[1].splitlines() if line.startswith("error: "))
    assert line.startswith("error: devices: another of the 2 processes has ended or can't be")
    left = [path.name[:14] for path in (tmp_path / "two").rglob("step-*.npz")]
    assert sorted(left) == ["step-000000001", "step-000000002"]

    statuses, (leader, follower) = both(tmp_path)
    assert statuses == [0, 0], leader[1] + follower[1]
    assert "Continuing after epoch 0 of 2, step 2 of 3." in leader[0]
    # Gloo, which connects the processes, greets the other side.
    assert all(line.startswith("[Gloo]") for line in follower[0].splitlines())
    assert alone.communicate() and alone.returncode == 0
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        # Sums in another order, as in test_devices.
        np.testing.assert_allclose(two[name], value, rtol=5e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "devices, variables, said",
    [
        (1, {"JAX_COORDINATOR_ADDRESS": "host:1"}, "devices: 1, but JAX_COORDINATOR_ADDRESS is"),
        ("all", {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES: '0' should be a whole number from"),
        (
            "all",
            {"JAX_COORDINATOR_ADDRESS": "node01"},
            "JAX_COORDINATOR_ADDRESS: 'node01' should be",
        ),
        ("all", {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID: 'one' should be a whole number from 0"),
    ],
)
def test_an_environment_that_can_not_be_is_refused(devices, variables, said, monkeypatch):
    given = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    for name, value in (given | variables).items():
        monkeypatch.setenv(name, value)
    config = ExperimentConfig("resnet8", "resnet8", devices=devices)
    with pytest.raises(dskd_keras.InputError, match=f"^{said}"):
        hosts.join(config, "jax")


@pytest.mark.once
@pytest.mark.parametrize(
    "backend, name, value",
    [
        ("torch", "JAX_COORDINATOR_ADDRESS", "host:1"), ("torch", "WORLD_SIZE", "2"),
        ("tensorflow", "TF_CONFIG", "{}"),
    ],
)  # fmt: skip
def test_other_backends_train_in_one_process(backend, name, value, monkeypatch):
    config = ExperimentConfig("resnet8", "resnet8")
    hosts.join(config, backend)
    monkeypatch.setenv(name, value)
    with pytest.raises(dskd_keras.InputError, match=f"^{name}: '{value}', but on {backend} Keras"):
        hosts.join(config, backend)


def test_tasks_of_slurm_join_where_several_devices_are_asked_for(monkeypatch):
    joined = []
    monkeypatch.setattr(hosts, "_number", lambda name, least: joined.append(name) or 1)
    config = ExperimentConfig("resnet8", "resnet8", devices="all")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    hosts.join(config, "jax")
    assert not joined, "the script of a job, before srun"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    hosts.join(ExperimentConfig("resnet8", "resnet8"), "jax")
    assert not joined, "tasks that have nothing to do with one another"
    hosts.join(config, "jax")
    assert joined
