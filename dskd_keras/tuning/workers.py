"""Several workers: KerasTuner's chief and its protocol, with workers that may die."""

import contextlib
import os
import re
import signal
import subprocess
import time
from concurrent import futures

import grpc
from keras_tuner.src import protos
from keras_tuner.src.distribute import oracle_chief, oracle_client

from dskd_keras.errors import InputError, TrainingError

_ADDRESS = ("KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")
_ROLE = "KERASTUNER_TUNER_ID"
# Of the chief that started this process; without it nobody wants the results.
_CHIEF_PID = "DSKD_KERAS_CHIEF_PID"
_LOOK = 0.5
# Workers that died without a trial finished in between: then the reason is no single trial.
_MOST_DEATHS_IN_A_ROW = 6
# Exit status of a command whose input can't be used.
_BAD_INPUT = 2


def role():
    """Returns this process's part by KerasTuner's environment variables.

    Returns:
        `"chief"`, `"worker"`, or None where there is no chief.

    Raises:
        InputError: Some of the three variables are set and others are not.
    """
    names = (*_ADDRESS, _ROLE)
    missing = [name for name in names if not os.environ.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not set. A chief and its workers need all of "
            f"{', '.join(names)}."
        )
    if not os.environ[_ADDRESS[1]].isdigit():
        raise InputError(f"{_ADDRESS[1]}: {os.environ[_ADDRESS[1]]!r} should be a port's number.")
    return "chief" if "chief" in os.environ[_ROLE] else "worker"


def find_chief(seconds):
    """Waits for the chief, and makes it the limit of all later questions, too.

    Args:
        seconds: How long.

    Raises:
        InputError: It is not there.
    """
    address = ":".join(os.environ[name] for name in _ADDRESS)
    # KerasTuner waits for an hour, in every question.
    oracle_client.TIMEOUT = seconds
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise InputError(
                f"KERASTUNER_ORACLE_IP: no chief answers at {address} after {seconds:g} s. Start "
                "it first, with KERASTUNER_TUNER_ID=chief."
            ) from None


def is_orphan():
    """Returns whether the chief that started this process is no more."""
    started_by = os.environ.get(_CHIEF_PID)
    return started_by is not None and int(started_by) != os.getppid()


@contextlib.contextmanager
def chief_errors_in_one_line():
    """Says in one line that the chief is gone."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code().name if hasattr(error, "code") else "unknown"
        raise TrainingError(
            f"the chief no longer answers ({code}). The trial's checkpoint is kept: a chief that "
            "is started with --resume goes on from it."
        ) from error


class Chief:
    """Serves an oracle to workers until the search is over.

    Args:
        oracle: One of `oracles`.
        worker_timeout: Seconds without a sign of life after which a worker counts as dead.
        console: A `rich.console.Console` for messages.
        address: `HOST:PORT` to listen at; port 0 takes a free one. Defaults to KerasTuner's
            environment variables.

    Attributes:
        port: The port.

    Raises:
        InputError: It can't listen there.
    """

    def __init__(self, oracle, worker_timeout, console, address=None):
        address = address or ":".join(os.environ[name] for name in _ADDRESS)
        self._oracle = oracle
        self._worker_timeout = worker_timeout
        self._console = console
        self._servicer = oracle_chief.OracleServicer(oracle)
        # One thread, as KerasTuner has it: proposals are made one after another.
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=1), options=[("grpc.so_reuseport", 0)]
        )
        protos.get_service_grpc().add_OracleServicer_to_server(self._servicer, self._server)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise InputError(
                f"KERASTUNER_ORACLE_PORT: can't listen at {address}. Is another chief running?"
            )

    def serve(self, stop, look):
        """Serves until the search is over.

        KerasTuner's own loop waits for ever for a worker that died.

        Args:
            stop: An `interruption.StopRequest`; ends it early.
            look: Called without arguments twice a second.
        """
        self._server.start()
        try:
            while stop.signum is None:
                time.sleep(_LOOK)
                look()
                for tuner_id in self._oracle.silent(self._worker_timeout):
                    self.give_up(tuner_id, f"it was silent for {self._worker_timeout:g} s")
                over = self._servicer.stop_triggered or self._oracle.failure
                if over and self._oracle.is_over():
                    break
            look()
        finally:
            self._server.stop(grace=_LOOK).wait()

    def give_up(self, tuner_id, reason):
        """Takes a worker for dead and its trial from it."""
        trial_id = self._oracle.abandon(tuner_id, f"{tuner_id}: {reason}")
        if trial_id is not None:
            self._console.print(f"{tuner_id} is gone ({reason}): trial {trial_id} is to be redone.")


class LocalWorkers:
    """Worker processes on this machine; one that dies is replaced.

    Args:
        count: Number of workers.
        command: The command line of a worker, a list.
        chief: The `Chief`.
        oracle: Its oracle.
        folder: Where they write their logs, `worker-N.log`.
        console: A `rich.console.Console` for messages.
    """

    def __init__(self, count, command, chief, oracle, folder, console):
        self._command = command
        self._chief = chief
        self._oracle = oracle
        self._folder = folder
        self._console = console
        self._processes = {}
        self._deaths = 0
        self._ended = 0
        for number in range(1, count + 1):
            self._start(f"worker-{number}")

    def watch(self):
        """Replaces workers that died.

        Raises:
            InputError: A worker can't use its configuration, and neither could any other.
            TrainingError: Too many died.
        """
        ended = len(self._oracle.ended())
        if ended > self._ended:
            self._ended, self._deaths = ended, 0
        for name, process in list(self._processes.items()):
            status = process.poll()
            if status is None:
                continue
            del self._processes[name]
            if status == 0:
                continue
            said = self._last_error(name)
            if status == _BAD_INPUT and said:
                raise InputError(said)
            reason = signal.Signals(-status).name if status < 0 else said or f"status {status}"
            self._chief.give_up(name, reason)
            self._deaths += 1
            if self._deaths >= _MOST_DEATHS_IN_A_ROW:
                raise TrainingError(
                    f"{self._deaths} workers died without finishing a trial, the last of {reason}. "
                    f"See '{self._log(name)}'; --resume goes on."
                )
            self._start(name)

    def end(self):
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

    def _start(self, name):
        environment = {
            **os.environ,
            _ADDRESS[0]: "127.0.0.1",
            _ADDRESS[1]: str(self._chief.port),
            _ROLE: name,
            _CHIEF_PID: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        }
        with open(self._log(name), "ab") as log:
            # A session of its own: a terminal's Ctrl-C is for the chief, which tells the workers.
            self._processes[name] = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self._console.print(
            f"Started {name} (process {self._processes[name].pid}), log: {self._log(name)}"
        )

    def _log(self, name):
        return self._folder / f"{name}.log"

    def _last_error(self, name):
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if re.match("error: ", line)]
        return errors[-1].removeprefix("error: ") if errors else None
