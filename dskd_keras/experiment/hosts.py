"""Several processes, on one host or more, that train one model together. JAX alone.

Process 0 leads: it alone reads and writes files, decides what is done next, and prints. The others
follow: they read the images, hear of each training from process 0, and take every step with it.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dskd_keras import keras_internals
from dskd_keras.errors import InputError, TrainingError, wrong
from dskd_keras.experiment.config import ExperimentConfig

# Seconds without a sign of life after which a process counts as dead.
_HEARTBEAT = 30
# What asks each backend for several processes; TensorFlow's and PyTorch's, to say that it can't be.
_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_ASKING = {"tensorflow": "TF_CONFIG", "torch": "WORLD_SIZE"}
# In what is raised where a process has gone, by Gloo, NCCL and the coordination service.
_LOST = ("gloo", "nccl", "coordination", "unavailable", "deadline", "connection", "heartbeat")


class Hosts:
    """This process among those that train together.

    Attributes:
        count: How many there are.
        index: The number of this one; 0 leads.
        busy: Whether they train.
    """

    count = 1
    index = 0
    busy = False

    @property
    def leads(self) -> bool:
        """Whether this process writes and decides."""
        return self.index == 0

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """A context at whose end the followers are told that nothing follows."""
        yield

    @contextlib.contextmanager
    def together(self, **job: Any) -> Iterator[None]:
        """A context for a training in which the followers take part, by what the job says."""
        yield

    def hear(self) -> dict[str, Any] | None:
        """Returns the next job of a follower, None at the end, however long it has to wait."""
        return None

    def shared(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the leader's arrays, in every process; all of them have to call it."""
        return list(arrays)


class _Joined(Hosts):
    def __init__(self, count: int, index: int) -> None:
        self.count = count
        self.index = index
        self._told = 0
        # Whether the others train, where a process that fails leaves them in the middle of a step.
        self.busy = False

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        try:
            yield
        finally:
            if not self.busy:
                self._tell(None)

    @contextlib.contextmanager
    def together(self, **job: Any) -> Iterator[None]:
        self._tell(job)
        self.busy = True
        self._meet()
        yield
        self.busy = False

    def _tell(self, job: dict[str, Any] | None) -> None:
        keras_internals.publish(f"dskd_keras/{self._told}", json.dumps(job))
        self._told += 1

    def hear(self) -> dict[str, Any] | None:
        self.busy = False
        job = json.loads(keras_internals.published(f"dskd_keras/{self._told}"))
        self._told += 1
        if job is not None:
            self.busy = True
            self._meet()
        return job

    def _meet(self) -> None:
        # Gloo opens its connections with the first step, and waits 30 seconds for all processes.
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("dskd_keras")

    def shared(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        from jax.experimental.multihost_utils import broadcast_one_to_all

        file = io.BytesIO()
        np.savez(file, *arrays)
        content = np.frombuffer(file.getvalue(), np.uint8)
        size = int(broadcast_one_to_all(np.array(len(content), np.int32)))
        if not self.leads:
            content = np.zeros(size, np.uint8)
        content = broadcast_one_to_all(content)
        with np.load(io.BytesIO(content.tobytes())) as found:
            return [found[f"arr_{number}"] for number in range(len(found.files))]


_here = Hosts()


def here() -> Hosts:
    """Returns this process's place, alone unless it has joined others."""
    return _here


def join(config: ExperimentConfig, backend: str) -> None:
    """Joins the processes that the environment names, before JAX is first used.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name them; within a step of
    several tasks, SLURM does, where `devices` asks for more than one.

    Raises:
        InputError: The environment asks for what can't be, or the processes don't find each other.
    """
    global _here
    if backend != "jax":
        for name in (_ADDRESS, _ASKING[backend]):
            if os.environ.get(name, "1") not in ("", "1"):
                raise InputError(
                    f"{name}: {os.environ[name]!r}, but on {backend} Keras trains in one process. "
                    "Set KERAS_BACKEND to jax, or unset it."
                )
        return
    if not os.environ.get(_ADDRESS) and (config.devices == 1 or not _is_slurm()):
        return
    count, index = _number("JAX_NUM_PROCESSES", 1), _number("JAX_PROCESS_ID", 0)
    if count == 1:
        return
    if config.devices == 1:
        raise InputError(
            f"devices: 1, but {_ADDRESS} is set, so that processes train together. Take --devices "
            "all, or unset it."
        )
    address = os.environ.get(_ADDRESS)
    if address and not address.rpartition(":")[2].isdecimal():
        raise wrong(_ADDRESS, address, "a host and a port, such as node01:12345")
    import jax

    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{_ADDRESS}: {address!r} did not bring the processes together "
            f"({reason}). Set it, JAX_NUM_PROCESSES and JAX_PROCESS_ID in each of them."
        ) from error
    if jax.process_count() > 1:
        _here = _Joined(jax.process_count(), jax.process_index())


def _is_slurm() -> bool:
    """Whether this is one of several tasks that one `srun` has started."""
    steps = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
    return all(os.environ.get(name, "1") not in ("", "1") for name in steps)


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        raise wrong(name, text, f"a whole number from {least}")
    return int(text)


@contextlib.contextmanager
def losses_in_one_line() -> Iterator[None]:
    """Says that another process is gone as a `TrainingError`."""
    try:
        yield
    except (InputError, TrainingError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if _here.count == 1 or not any(word in reason.lower() for word in _LOST):
            raise
        raise TrainingError(
            f"devices: another of the {_here.count} processes has ended or can't be reached "
            f"({reason[:200]}). Start all of them again with --resume."
        ) from error


def leave(status: int) -> None:
    """Ends a process that failed in a training of several at once: they notice it by that.

    Python would wait for the others, which wait for this one.
    """
    if status and (_here.busy or not _here.leads):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
