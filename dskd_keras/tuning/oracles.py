"""KerasTuner's oracles, made to survive: a kill at any moment, workers that die, trials that fail.

As they are they write several files in place, one after another, so that a killed search loses a
trial or repeats one; they wait for ever for a worker that died; and an error while they hold their
lock is a deadlock.
"""

import collections
import json
import time
import warnings
from pathlib import Path

import keras_tuner
import numpy as np
from keras_tuner.engine.trial import Trial, TrialStatus
from sklearn.exceptions import ConvergenceWarning

from dskd_keras import artifacts
from dskd_keras.errors import InputError

# A trial whose process died that often before its first checkpoint is taken for the reason.
_MOST_DEATHS = 3
_DEFAULT_TRIALS = 30
# Of Hyperband: a third of the trials goes on, with three times the epochs.
FACTOR = 3
OBJECTIVE = keras_tuner.Objective("val_accuracy", "max")


class _Durable:
    """A mixin for `keras_tuner.Oracle`.

    Its state and that of all trials are one file, `oracle.json`, written aside and renamed: what a
    killed search left is always one moment of it.

    Args:
        max_trials: Trials at most, None for as many as the tuner makes.
        max_failures: The search ends when that many trials in a row have failed.
        **kwargs: As for the oracle.

    Attributes:
        failure: Why the search ended early, a sentence; None if it did not.
        news: Ids of trials that ended, a `collections.deque` for somebody else to empty: what they
            print or write must not fail while the oracle is locked.
        begun: Called with a trial's id, says whether it has a checkpoint to go on from.
    """

    def __init__(self, max_trials, max_failures, **kwargs):
        super().__init__(
            objective=OBJECTIVE,
            # Counted here: one failing trial, or three, are no reason to stop.
            max_consecutive_failed_trials=np.inf,
            **kwargs,
        )
        # KerasTuner names the trials by the number of digits of its `max_trials`, which a later,
        # larger number would change. `populate_space` counts them.
        self.max_trials = None
        self.most_trials = max_trials
        self.failure = None
        self.news = collections.deque()
        self.begun = lambda trial_id: False
        self._max_failures = max_failures
        self._failures_in_a_row = 0
        self._deaths = {}
        self._last_heard = {}
        self.verbose = 0

    def populate_space(self, trial_id):
        """Proposes values, none of them twice."""
        if self.failure or (self.most_trials and len(self.trials) >= self.most_trials):
            return {"status": TrialStatus.STOPPED}
        response = super().populate_space(trial_id)
        # Bayesian optimisation may propose what it knows.
        if response["status"] == TrialStatus.RUNNING and self._duplicate(response["values"]):
            values = self._random_values()
            if values is None:
                return {"status": TrialStatus.STOPPED}
            response["values"] = values
        return response

    def _random_values(self):
        # The first trial is the configuration as it is: what the others are to be compared with.
        if not self.trials:
            return dict(self.hyperparameters.values)
        return super()._random_values()

    @keras_tuner.synchronized
    def create_trial(self, tuner_id):
        """Hands out a trial; while others run a worker waits, since one may have to be redone.

        Args:
            tuner_id: As in KerasTuner.
        """
        self._last_heard[tuner_id] = time.monotonic()
        trial = super().create_trial(tuner_id)
        if trial.status == TrialStatus.STOPPED and self.ongoing_trials and not self.failure:
            trial.status = TrialStatus.IDLE
            self.tuner_ids.add(tuner_id)
        return trial

    @keras_tuner.synchronized
    def get_trial(self, trial_id):
        """Returns a trial; from the worker that runs it, this is also its sign of life."""
        for tuner_id, trial in self.ongoing_trials.items():
            if trial.trial_id == trial_id:
                self._last_heard[tuner_id] = time.monotonic()
        return super().get_trial(trial_id)

    @keras_tuner.synchronized
    def update_trial(self, trial_id, metrics, step=0):
        """Takes a trial's result; the first one counts."""
        trial = self.trials[trial_id]
        if trial_id in self.end_order:
            return trial
        return super().update_trial(trial_id, metrics, step)

    @keras_tuner.synchronized
    def end_trial(self, trial):
        """Ends a trial, unless a worker that was thought dead comes too late with it."""
        trial_id = trial.trial_id
        if trial_id in self.end_order:
            return
        super().end_trial(trial)
        self._note_end(self.trials[trial_id])
        # KerasTuner saves while the trial still counts as ongoing.
        self.save()

    @keras_tuner.synchronized
    def abandon(self, tuner_id, reason=None):
        """Takes a trial from a worker that is gone, for another one to go on with.

        Args:
            tuner_id: The worker.
            reason: What it died of; None if it was asked to stop.

        Returns:
            The trial's id, None if it had none.
        """
        self.tuner_ids.discard(tuner_id)
        self._last_heard.pop(tuner_id, None)
        trial = self.ongoing_trials.pop(tuner_id, None)
        if trial is None:
            return None
        self._queue_again(trial, reason)
        self.save()
        return trial.trial_id

    @keras_tuner.synchronized
    def silent(self, seconds):
        """Returns the workers that were not heard of for so long."""
        now = time.monotonic()
        return [
            tuner_id
            for tuner_id in sorted({*self.ongoing_trials, *self.tuner_ids})
            if now - self._last_heard.get(tuner_id, now) > seconds
        ]

    @keras_tuner.synchronized
    def is_over(self):
        """Returns whether no worker has a trial or waits for one, and none is left to be redone."""
        # A search that ended early leaves what is to be redone to the one that resumes it.
        left = self._retry_queue and not self.failure
        return not (self.ongoing_trials or self.tuner_ids or left)

    def ended(self):
        """Returns the trials that ended, the best first, the failed last."""
        ended = [self.trials[trial_id] for trial_id in self.end_order]
        return sorted(ended, key=lambda trial: -1.0 if trial.score is None else trial.score,
                      reverse=True)  # fmt: skip

    def save(self):
        """Writes the state, whole or not at all."""
        state = {
            "oracle": self.get_state(),
            "trials": [trial.get_state() for trial in self.trials.values()],
            "deaths": self._deaths,
        }
        try:
            artifacts.write_text(self._path(), json.dumps(state))
        except OSError as error:
            # Raised here it would leave the lock locked, and a chief that answers nobody.
            self.failure = f"can't write '{self._path()}': {error.strerror}"

    def reload(self):
        """Reads what a search left, if there is something; its unfinished trials go on.

        Returns:
            Whether there was.

        Raises:
            InputError: It is damaged.
        """
        if not self._path().is_file():
            return False
        try:
            state = json.loads(self._path().read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(
                f"run_dir: '{self._path()}' is damaged: not JSON. Choose another --run_dir."
            ) from None
        trials = [Trial.from_state(trial) for trial in state["trials"]]
        self.trials = {trial.trial_id: trial for trial in trials}
        self._deaths = state["deaths"]
        self.set_state(state["oracle"])
        ongoing, self.ongoing_trials = self.ongoing_trials, {}
        for trial in ongoing.values():
            if trial.trial_id not in self.end_order:
                self._queue_again(trial, "its process died")
        return True

    def _queue_again(self, trial, reason):
        trial.metrics = type(trial.metrics)()
        if reason is not None and not self.begun(trial.trial_id):
            self._deaths[trial.trial_id] = self._deaths.get(trial.trial_id, 0) + 1
        if self._deaths.get(trial.trial_id, 0) >= _MOST_DEATHS:
            trial.status = TrialStatus.FAILED
            trial.message = f"{reason}, {_MOST_DEATHS} times before its first checkpoint"
            self.end_order.append(trial.trial_id)
            self._note_end(trial)
        else:
            self._retry_queue.append(trial.trial_id)

    def _note_end(self, trial):
        if trial.status == TrialStatus.FAILED:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= self._max_failures:
                self.failure = f"the last {self._failures_in_a_row} trials failed"
        else:
            self._failures_in_a_row = 0
        self.news.append(trial.trial_id)

    def _save_trial(self, trial):
        # All are in oracle.json.
        pass

    def _path(self):
        return Path(self._project_dir) / "oracle.json"


class Random(_Durable, keras_tuner.oracles.RandomSearchOracle):
    """Random search."""


class Bayesian(_Durable, keras_tuner.oracles.BayesianOptimizationOracle):
    """Bayesian optimisation, after a third of the trials at random, of a search that resumes."""

    def __init__(self, max_trials, max_failures, hyperparameters, **kwargs):
        # KerasTuner's three a dimension would be most of a usual search.
        most = max(3, 2 * len(hyperparameters.space))
        super().__init__(
            max_trials,
            max_failures,
            hyperparameters=hyperparameters,
            num_initial_points=max(2, min(most, max_trials // 3)),
            **kwargs,
        )

    def populate_space(self, trial_id):
        """Proposes values that depend on the seed and the trials before alone."""
        self._random_state = np.random.RandomState([self.seed, len(self.trials)])
        with warnings.catch_warnings():
            # Few trials fit many length scales: of no use to who searches.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return super().populate_space(trial_id)


class Hyperband(_Durable, keras_tuner.oracles.HyperbandOracle):
    """Hyperband; with a number of trials it takes brackets that they are enough for."""

    def __init__(self, max_trials, max_failures, max_epochs, **kwargs):
        # The base class starts a bracket at once.
        self.most_trials = max_trials
        super().__init__(
            max_trials,
            max_failures,
            max_epochs=max_epochs,
            factor=FACTOR,
            # None: round after round, until the trials are used up.
            hyperband_iterations=None if max_trials else 1,
            **kwargs,
        )

    def _start_new_bracket(self):
        if self.most_trials is not None:
            left = self.most_trials - len(self.trials)
            while self._current_bracket and self._bracket_trials(self._current_bracket) > left:
                self._current_bracket -= 1
        super()._start_new_bracket()

    def _bracket_trials(self, bracket):
        return sum(self._get_size(bracket, number) for number in range(bracket + 1))

    def trials_to_halve(self):
        """Returns how many trials the smallest bracket has that stops some of them early."""
        return self._bracket_trials(1)


def create(config, epochs, hyperparameters):
    """Returns the oracle for a configuration.

    Args:
        config: A `SearchConfig`.
        epochs: Epochs of a trial.
        hyperparameters: `keras_tuner.HyperParameters`, everything declared.
    """
    common = {
        "max_failures": config.max_failures,
        "hyperparameters": hyperparameters,
        # KerasTuner takes 0 for none.
        "seed": config.search_seed + 1,
        "allow_new_entries": False,
    }
    most = most_trials(config)
    if config.tuner == "hyperband":
        return Hyperband(most, max_epochs=epochs, **common)
    return {"bayesian": Bayesian, "random": Random}[config.tuner](most, **common)


def most_trials(config):
    """Returns how many trials a search makes at most; None for all that Hyperband has."""
    if config.max_trials is None and config.tuner != "hyperband":
        return _DEFAULT_TRIALS
    return config.max_trials
