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

# KerasTuner's private methods that classes of this package override, each with the class that does.
# They can't be reached through functions.
HOOKS: dict[str, str] = {
    # The first trial is the configuration as it is.
    "keras_tuner.Oracle._random_values": "dskd_keras.tuning.oracles.DurableOracle",
    # The state of all trials is one file.
    "keras_tuner.Oracle._save_trial": "dskd_keras.tuning.oracles.DurableOracle",
    # Takes a bracket that the trials are enough for.
    "keras_tuner.oracles.HyperbandOracle._start_new_bracket": "dskd_keras.tuning.oracles.Hyperband",
}


def print_no_tracebacks() -> None:
    """Keeps KerasTuner from printing the traceback of every failed trial."""
    config.DEBUG = False


# Chief and workers.


def add_servicer(oracle: keras_tuner.Oracle, server: Any) -> Callable[[], bool]:
    """Lets a gRPC server answer workers for an oracle.

    KerasTuner's public way, `Tuner.search` in a chief, waits for ever for a worker that died.

    Returns:
        A function that says whether a worker has been told that the search is over.
    """
    servicer = oracle_chief.OracleServicer(oracle)
    protos.get_service_grpc().add_OracleServicer_to_server(servicer, server)
    return lambda: servicer.stop_triggered


def limit_waiting(seconds: float) -> None:
    """Limits how long a worker waits for an answer of its chief, which is an hour by default."""
    oracle_client.TIMEOUT = seconds


# Oracles.


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


def bracket(oracle: keras_tuner.oracles.HyperbandOracle) -> int:
    """Returns the number of Hyperband's bracket, that of the last one is 0."""
    return oracle._current_bracket


def set_bracket(oracle: keras_tuner.oracles.HyperbandOracle, number: int) -> None:
    """Makes Hyperband go on with a bracket."""
    oracle._current_bracket = number


def trials_of_bracket(oracle: keras_tuner.oracles.HyperbandOracle, number: int) -> int:
    """Returns how many trials a bracket of Hyperband has, in all of its rounds."""
    return sum(oracle._get_size(number, round_number) for round_number in range(number + 1))
