"""Several workers: KerasTuner's chief and its protocol, with workers that may die."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Literal

import grpc

from dskd_keras.errors import InputError, TrainingError, wrong
from dskd_keras.experiment.interruption import Interrupted, StopRequest
from dskd_keras.tuning import keras_tuner_internals
from dskd_keras.tuning.plan import SearchPlan

_ADDRESS = ("KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")
_ROLE = "KERASTUNER_TUNER_ID"
# Of the chief that started this process; without it nobody wants the results.
_CHIEF_PID = "DSKD_KERAS_CHIEF_PID"
# Seconds between two looks at the workers.
_POLL = 0.5
# Deaths without a trial finished in between after which the reason is no single trial: so many for
# each worker, since a machine that runs out of memory may end all of them at once, and no fewer.
_MOST_DEATHS_A_WORKER = 3
_FEWEST_DEATHS = 6
# Requests that the chief works at or lets wait at the same time. The oracle's lock takes proposals
# and ends one after another; signs of life are answered meanwhile.
_THREADS = 64
# Exit status of a command whose input can't be used.
_BAD_INPUT = 2


def role() -> Literal["chief", "worker"] | None:
    """Returns this process's part by KerasTuner's environment variables, None without a chief."""
    names = (*_ADDRESS, _ROLE)
    missing = [name for name in names if not os.environ.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not set. A chief and its workers need all of "
            f"{', '.join(names)}."
        )
    port = os.environ[_ADDRESS[1]]
    if not port.isdigit():
        raise wrong(_ADDRESS[1], port, "a port's number")
    return "chief" if "chief" in os.environ[_ROLE] else "worker"


def wait_for_chief(seconds: float) -> None:
    """Waits so long for the chief, as all later questions to it do; `InputError` without one."""
    address = _address()
    keras_tuner_internals.limit_waiting(seconds)
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise InputError(
                f"KERASTUNER_ORACLE_IP: no chief answers at {address} after {seconds:g} s. Start "
                "it first, with KERASTUNER_TUNER_ID=chief."
            ) from None


def chief_has_ended() -> bool:
    """Returns whether the chief that started this process is no more."""
    started_by = os.environ.get(_CHIEF_PID)
    return started_by is not None and int(started_by) != os.getppid()


@contextlib.contextmanager
def chief_errors_in_one_line() -> Iterator[None]:
    """Says in one line that the chief is gone."""
    try:
        yield
    except grpc.RpcError as error:
        raise unanswered(error.code().name if hasattr(error, "code") else "unknown") from error


def unanswered(reason: str) -> TrainingError:
    """Returns the error of a worker whose chief did not answer."""
    return TrainingError(
        f"the chief no longer answers ({reason}). The trial's checkpoint is kept: a chief that is "
        "started with --resume goes on from it."
    )


def _address() -> str:
    return ":".join(os.environ[name] for name in _ADDRESS)


class Chief:
    """Serves an oracle to workers; with their command it starts them itself, on this machine.

    Each of its own that dies is replaced. They write their logs beside the search, `worker-N.log`.
    """

    def __init__(self, search: SearchPlan, command: Sequence[str] | None):
        self.oracle = search.oracle
        self._search = search
        self._say = search.console.print
        self._command = command
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._deaths = 0
        self._ended = 0
        # KerasTuner has one thread, in which all requests wait for a proposal.
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=_THREADS), options=[("grpc.so_reuseport", 0)]
        )
        self._told_that_it_is_over = keras_tuner_internals.add_servicer(self.oracle, self._server)
        # Port 0 takes a free one.
        address = _address() if command is None else "127.0.0.1:0"
        try:
            self._port = self._server.add_insecure_port(address)
        except RuntimeError:
            self._port = 0
        if not self._port:
            raise InputError(
                f"KERASTUNER_ORACLE_PORT: can't listen at {address}. Is another chief running?"
            )

    def run(self) -> None:
        """Hands out trials until the search is over; `Interrupted` where it was asked to stop."""
        announce = "Stopping the workers; once more to stop at once."
        with StopRequest(lambda: self._say(announce)) as stop:
            try:
                self._serve(stop)
            finally:
                self._server.stop(grace=_POLL).wait()
                self._stop_workers()
            if stop.signum is not None:
                raise Interrupted(stop.signum)

    def _serve(self, stop: StopRequest) -> None:
        config = self._search.config
        # KerasTuner makes the oracle's lock at its first use, for which two threads might make two.
        self.oracle.is_over()
        self._server.start()
        if self._command is None:
            self._say(f"Waiting for workers at port {self._port}.")
        else:
            for number in range(1, config.workers + 1):
                self._start(f"worker-{number}")
        while stop.signum is None:
            time.sleep(_POLL)
            self._search.report_ended()
            self.replace_dead()
            for tuner_id in self.oracle.unresponsive_workers(config.worker_timeout):
                self._count_as_dead(tuner_id, f"no sign of life for {config.worker_timeout:g} s")
            over = self._told_that_it_is_over() or self.oracle.failure
            if over and self.oracle.is_over():
                break
        self._search.report_ended()

    def _count_as_dead(self, tuner_id: str, reason: str) -> None:
        trial_id = self.oracle.requeue(tuner_id, f"{tuner_id}: {reason}")
        if trial_id is not None:
            self._say(f"{tuner_id} is gone ({reason}): trial {trial_id} is to be redone.")

    def replace_dead(self) -> None:
        """Starts another worker for each that died, unless no other could do better."""
        ended = len(self.oracle.end_order)
        if ended > self._ended:
            self._ended, self._deaths = ended, 0
        for name, process in list(self._processes.items()):
            status = process.poll()
            if status is None:
                continue
            del self._processes[name]
            if status == 0:
                continue
            log = self._log(name).read_text(encoding="utf-8", errors="replace")
            error = (re.findall(r"^error: (.*)", log, re.MULTILINE) or [""])[-1]
            if status == _BAD_INPUT and error:
                raise InputError(error)
            reason = signal.Signals(-status).name if status < 0 else error or f"status {status}"
            self._count_as_dead(name, reason)
            self._deaths += 1
            most = max(_FEWEST_DEATHS, _MOST_DEATHS_A_WORKER * self._search.config.workers)
            if self._deaths >= most:
                raise TrainingError(
                    f"{self._deaths} workers died without finishing a trial, the last of {reason}. "
                    f"See '{self._log(name)}'; --resume goes on."
                )
            self._start(name)

    def _stop_workers(self) -> None:
        """Asks the workers to stop and waits for them; a second Ctrl-C ends them at once."""
        for process in self._processes.values():
            process.terminate()
        try:
            for process in self._processes.values():
                process.wait()
        except KeyboardInterrupt:
            for process in self._processes.values():
                process.kill()
                process.wait()
            raise

    def _start(self, name: str) -> None:
        assert self._command is not None
        environment = {
            **os.environ,
            _ADDRESS[0]: "127.0.0.1",
            _ADDRESS[1]: str(self._port),
            _ROLE: name,
            _CHIEF_PID: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        with open(self._log(name), "ab") as log:
            # A session of its own: a terminal's Ctrl-C is for the chief, which tells the workers.
            process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self._processes[name] = process
        self._say(f"Started {name} (process {process.pid}), log: {self._log(name)}")

    def _log(self, name: str) -> Path:
        return self._search.folder / f"{name}.log"
