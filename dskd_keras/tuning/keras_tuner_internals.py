"""The one place that reaches for what KerasTuner keeps private.

Each function here says what the private name is needed for: KerasTuner has no public way to it. The
tests in `tests/test_keras_tuner_internals.py` name the one that a new version has taken away.
"""

from collections.abc import Callable
from typing import Any

import keras_tuner
import numpy as np
from keras_tuner.src import config, protos
from keras_tuner.src.distribute import oracle_chief, oracle_client


def print_no_tracebacks() -> None:
    """Keeps KerasTuner from printing the traceback of every failed trial."""
    config.DEBUG = False


def add_servicer(oracle: keras_tuner.Oracle, server: Any) -> Callable[[], bool]:
    """Lets a gRPC server answer workers; returns what says whether one was told that it is over.

    KerasTuner's public way, `Tuner.search` in a chief, waits for ever for a worker that died.
    """
    servicer = oracle_chief.OracleServicer(oracle)
    protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
    return lambda: servicer.stop_triggered


def limit_waiting(seconds: float) -> None:
    """Limits how long a worker waits for an answer of its chief, which is an hour by default."""
    oracle_client.TIMEOUT = seconds


def waiting_trials(oracle: keras_tuner.Oracle) -> list[str]:
    """Returns the ids of the trials that are run again before new ones; it may be changed."""
    return oracle._retry_queue


def was_tried(oracle: keras_tuner.Oracle, values: dict[str, Any]) -> bool:
    """Returns whether an earlier trial had these values."""
    return oracle._duplicate(values)


def set_random_state(
    oracle: keras_tuner.oracles.BayesianOptimizationOracle, state: np.random.RandomState
) -> None:
    """Replaces the random numbers of a Bayesian optimisation, which no saved state holds."""
    oracle._random_state = state


def lower_bracket(oracle: keras_tuner.oracles.HyperbandOracle, most: int) -> None:
    """Makes Hyperband go on with its next bracket of at most so many trials, or with the last."""
    while oracle._current_bracket and trials_of_bracket(oracle, oracle._current_bracket) > most:
        oracle._current_bracket -= 1


def trials_of_bracket(oracle: keras_tuner.oracles.HyperbandOracle, number: int) -> int:
    """Returns how many trials a bracket of Hyperband has in all its rounds; the last is 0."""
    return sum(oracle._get_size(number, round_number) for round_number in range(number + 1))
