"""Stopping a training run at the end of a step, by Ctrl-C or by a scheduler's SIGTERM."""

import signal
import threading
from collections.abc import Callable
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A training run was asked to stop.

    Attributes:
        signum: The signal that asked.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is noted and the second one interrupts.

    The training looks at `signum` after every step, where its state can be saved whole. In a thread
    other than the main one Python takes no signals, and they keep their usual effect.

    Args:
        announce: Called without arguments when the first signal arrives.

    Attributes:
        signum: The signal received, None before.
    """

    def __init__(self, announce: Callable[[], object]):
        self.signum: int | None = None
        self._announce = announce
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _receive(self, signum: int, _: object) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum
        self._announce()
