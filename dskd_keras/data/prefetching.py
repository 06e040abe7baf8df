"""Batches that other processes or threads make ahead of time."""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from dskd_keras.data import streams
from dskd_keras.data.plans import Batch, Plan
from dskd_keras.errors import TrainingError

# Batches that are being made or wait, for each worker.
_AHEAD = 2


@dataclasses.dataclass
class _Batch:
    """A batch that is being made.

    Attributes:
        index: Its index.
        pixels: Its images as bytes, which one of the workers makes.
        inputs: What the model takes: four times as large, so only the next batch has it ahead.
    """

    index: int
    pixels: "Future[Batch]"
    inputs: "Future[Batch] | None" = None


class Prefetched:
    """Batches by their index, made ahead in the order of the indices.

    Reading goes on where the last index ended; any other index begins anew there.

    Args:
        plan: What the batches are made by. It is sent to the processes.
        length: Number of batches, after which they begin again; `None` for no end.
        workers: Number of processes; 0 takes threads of this one.
    """

    def __init__(self, plan: Plan, length: int | None, workers: int) -> None:
        self._plan = plan
        self._length = length
        self._workers = workers
        self._makers: Executor | None = None
        self._finisher: Executor | None = None
        self._ahead: collections.deque[_Batch] = collections.deque()

    def __getitem__(self, index: int) -> Batch:
        """Returns batch `index`.

        Raises:
            InputError: A file is no image.
            TrainingError: A process was killed.
        """
        try:
            return self._made(index).result()
        except BrokenProcessPool as error:
            self.close()
            raise TrainingError(
                "stream: a process that decodes images has ended. If it was killed for its memory, "
                "take fewer stream_workers; a script that trains on streams has to do so under "
                "if __name__ == '__main__', since those processes import it."
            ) from error

    def close(self) -> None:
        """Ends the processes. They also end with this process."""
        self._drop()
        if self._makers is not None and self._finisher is not None:
            _shut_down(self._makers, self._finisher)
        self._makers = self._finisher = None

    def _made(self, index: int) -> "Future[Batch]":
        if not self._ahead or self._ahead[0].index != index:
            self._drop()
            self._submit(index)
        batch = self._ahead.popleft()
        while len(self._ahead) < _AHEAD * (self._workers or streams.cores()):
            last = self._ahead[-1].index if self._ahead else index
            self._submit((last + 1) % self._length if self._length else last + 1)
        inputs = self._inputs(batch)
        self._inputs(self._ahead[0])
        return inputs

    def _drop(self) -> None:
        for batch in self._ahead:
            batch.pixels.cancel()
        self._ahead.clear()

    def _submit(self, index: int) -> None:
        if self._makers is None:
            self._finisher = ThreadPoolExecutor(1)
            if self._workers:
                # Forked processes would inherit locks of the backend that nobody opens.
                spawning = multiprocessing.get_context("spawn")
                self._makers = ProcessPoolExecutor(
                    self._workers, spawning, initializer=_prepare_process, initargs=(self._plan,)
                )
            else:
                self._makers = ThreadPoolExecutor(streams.cores())
            # Where nobody has closed it: Python takes the executors apart in any order at its end.
            weakref.finalize(self, _shut_down, self._makers, self._finisher)
        if self._workers:
            with _without_keras():
                made = self._makers.submit(_make, index)
        else:
            made = self._makers.submit(self._plan.pixels, index)
        self._ahead.append(_Batch(index, made))

    def _inputs(self, batch: _Batch) -> "Future[Batch]":
        if batch.inputs is None:
            assert self._finisher is not None
            batch.inputs = self._finisher.submit(self._finish, batch.pixels)
        return batch.inputs

    def _finish(self, pixels: "Future[Batch]") -> Batch:
        images, labels = pixels.result()
        return self._plan.to_input(images), labels


def _shut_down(*executors: Executor) -> None:
    # The last reference may go in one of their own threads, which can't wait for itself.
    wait = threading.current_thread() is threading.main_thread()
    for executor in executors:
        executor.shutdown(wait, cancel_futures=True)


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    """Keeps processes that are started here from importing Keras, which takes them seconds."""
    name = "DSKD_KERAS_DEFER"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_plan: Plan | None = None  # of a process that makes batches


def _prepare_process(plan: Plan) -> None:
    """Leaves an interrupt to the process that trains, and ends with that, even if it is killed."""
    global _plan
    _plan = plan
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _make(index: int) -> tuple[np.ndarray, np.ndarray]:
    assert _plan is not None
    return _plan.pixels(index)
