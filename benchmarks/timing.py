"""Timing of several things in one process, in turn, so that all of them see the same machine."""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Literal

import jsonargparse
import numpy as np

# First of this project: it keeps Keras from being imported before the backend is chosen.
from dskd_commands import startup  # isort: split

from dskd_keras.answering import answer
from dskd_keras.errors import InputError

Backend = Literal["tensorflow", "jax", "torch"]


def run_command(main):
    """Runs a benchmark with the arguments of the command line; says what is wrong in one line."""

    def work():
        try:
            jsonargparse.auto_cli(main, exit_on_error=False)
        except jsonargparse.ArgumentError as error:
            raise InputError(f"{' '.join(str(error).split())}. --help shows all options.") from None

    sys.exit(answer(work))


def set_backend(backend):
    """Sets what Keras reads when it is imported: the backend, if one is named, and its options."""
    if backend is not None:
        os.environ["KERAS_BACKEND"] = backend
    startup.set_tensorflow_options()


def in_turn(contenders, rounds, steps, say):
    """Times contenders again and again, one after the other.

    A machine that others use too is faster in one minute than in the next. Figures of one round lie
    close together in time, so quotients are taken within a round.

    Args:
        contenders: Functions by name: given a number of steps they return the seconds of one.
        rounds: How often each is timed.
        steps: Steps each time.
        say: Called with a line of text now and then.

    Returns:
        Seconds a step, a list of one value a round, by name.
    """
    for name, run in contenders.items():
        say(f"warming up: {name}")
        run(2)
    seconds = {name: [] for name in contenders}
    for round in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(run(steps))
        latest = ", ".join(f"{name} {1000 * s[-1]:.1f}" for name, s in seconds.items())
        say(f"round {round + 1} of {rounds}, ms a step: {latest}")
    return seconds


def ratio(seconds, above, below):
    """Returns the median over the rounds of `Σ above / Σ below`, and its quartiles.

    Args:
        seconds: What `in_turn` returned.
        above: Names.
        below: Names.

    Returns:
        `{"median": …, "quartiles": [low, high]}`, or None where a name was not timed.
    """
    if not {*above, *below} <= seconds.keys():
        return None
    values = sum(np.array(seconds[name]) for name in above) / sum(
        np.array(seconds[name]) for name in below
    )
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "quartiles": [float(low), float(high)]}


def milliseconds(seconds):
    """Returns the median over the rounds in milliseconds."""
    return 1000 * statistics.median(seconds)


def memory(kind):
    """Returns this process's resident memory (`"VmRSS"`) or its peak so far (`"VmHWM"`), in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {kind}")


def machine():
    """Returns the processor, what it has for half precision, the accelerator and the versions."""
    cpu, flags = platform.processor(), set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
        if line.startswith("flags"):
            flags = set(line.split(":", 1)[1].split())
    versions = {}
    for package in ("keras", "tensorflow", "jax", "torch", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "vector instructions": sorted(
            flags & {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"}
        ),
        "versions": versions,
    }


def device():
    """Returns the accelerator's name, "cpu" where there is none."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        found = tf.config.list_physical_devices("GPU")
        return (
            tf.config.experimental.get_device_details(found[0])["device_name"] if found else "cpu"
        )
    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def write_json(path, result):
    """Writes a result to a file, if one is asked for."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
