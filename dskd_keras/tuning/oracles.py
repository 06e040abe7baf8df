"""KerasTuner's oracles, made to survive: a kill at any moment, workers that die, trials that fail.

As they are they write several files in place, one after another, so that a killed search loses a
trial or repeats one. They wait for ever for a worker that died. An error while they hold their lock
is a deadlock.
"""

import collections
import json
import threading
import time
import warnings
from typing import Any

import keras_tuner
import numpy as np
from keras_tuner.engine.hyperparameters import Fixed
from keras_tuner.engine.trial import Trial, TrialStatus
from sklearn.exceptions import ConvergenceWarning

from dskd_keras import files
from dskd_keras.experiment.checkpoints import CheckpointFolder
from dskd_keras.tuning import keras_tuner_internals
from dskd_keras.tuning.config import SearchConfig

# A trial whose process died that often before its first checkpoint is taken for the reason.
_MOST_DEATHS = 3
# Seconds that a worker's request for a trial waits for another's proposal: that of a Bayesian
# optimisation takes many.
_WAIT = 1.0
# Of Hyperband: a third of the trials goes on, with three times the epochs.
FACTOR = 3


class DurableOracle(keras_tuner.Oracle):
    """What all oracles here have in common; it comes before KerasTuner's among the base classes.

    Its state and that of all trials are one file, `oracle.json`, written aside and renamed: what a
    killed search left is always one moment of it.
    """

    def __init__(
        self, config: SearchConfig, space: keras_tuner.HyperParameters, **kwargs: Any
    ) -> None:
        # Before the base class, which starts Hyperband's first bracket at once.
        self._config = config
        self._most_trials = config.most_trials()
        super().__init__(
            objective=keras_tuner.Objective("val_accuracy", "max"),
            # Counted here: one failing trial, or three, are no reason to stop.
            max_consecutive_failed_trials=np.inf,
            hyperparameters=space,
            # KerasTuner takes 0 for none.
            seed=config.search_seed + 1,
            allow_new_entries=False,
            **kwargs,
        )
        # KerasTuner names the trials by the number of digits of its `max_trials`, which a later,
        # larger number would change. `populate_space` counts them.
        self.max_trials = None
        # Why the search ended early.
        self.failure: str | None = None
        # Trials that ended, for somebody else to report and to remove: what they print or write
        # must not fail while the oracle is locked.
        self.unreported: collections.deque[str] = collections.deque()
        self._failures_in_a_row = 0
        self._deaths: dict[str, int] = {}
        self._last_heard: dict[str, float] = {}
        self._proposing = threading.Lock()
        self._file = config.search_folder() / "oracle.json"
        self.verbose = 0

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Proposes values, none of them twice."""
        if self.failure or (self._most_trials and len(self.trials) >= self._most_trials):
            return {"status": TrialStatus.STOPPED}
        response = super().populate_space(trial_id)
        # Bayesian optimisation may propose what it knows.
        if response["status"] == TrialStatus.RUNNING and keras_tuner_internals.was_tried(
            self, response["values"]
        ):
            values = self._random_values()
            if values is None:
                return {"status": TrialStatus.STOPPED}
            response["values"] = values
        return response

    def _random_values(self) -> dict[str, Any] | None:
        # The first trial is the configuration as it is: what the others are to be compared with.
        if not self.trials:
            return dict(self.hyperparameters.values)
        return super()._random_values()

    def create_trial(self, tuner_id: str) -> Trial:
        """Hands out a trial, or the advice to ask again where a proposal for another takes long.

        Behind one another the proposals for many workers would take longer than these wait.
        """
        self._last_heard[tuner_id] = time.monotonic()
        if not self._proposing.acquire(timeout=_WAIT):
            self.tuner_ids.add(tuner_id)
            return Trial(hyperparameters=self.get_space(), status=TrialStatus.IDLE)
        try:
            return self._create_trial(tuner_id)
        finally:
            self._proposing.release()

    @keras_tuner.synchronized
    def _create_trial(self, tuner_id: str) -> Trial:
        """Hands out a trial; while others run a worker waits, since one may have to be redone."""
        trial = super().create_trial(tuner_id)
        if trial.status == TrialStatus.STOPPED and self.ongoing_trials and not self.failure:
            trial.status = TrialStatus.IDLE
            self.tuner_ids.add(tuner_id)
        return trial

    def get_trial(self, trial_id: str) -> Trial:
        """Returns a trial; from the worker that runs it, this is also its sign of life.

        It does not wait for a proposal, or that worker would be thought dead meanwhile.
        """
        for tuner_id, trial in list(self.ongoing_trials.items()):
            if trial.trial_id == trial_id:
                self._last_heard[tuner_id] = time.monotonic()
        return super().get_trial(trial_id)

    @keras_tuner.synchronized
    def end_trial(self, trial: Trial) -> None:
        """Ends a trial, unless a worker that was thought dead comes too late with it."""
        if trial.trial_id in self.end_order:
            return
        metrics = self.trials[trial.trial_id].metrics
        if trial.status == TrialStatus.COMPLETED and not metrics.exists(self.objective.name):
            # The worker was thought dead after its report, which was then dropped: who has the
            # trial now reports anew. KerasTuner would raise, and leave the lock locked.
            return
        super().end_trial(trial)
        waiting = keras_tuner_internals.waiting_trials(self)
        if trial.trial_id in waiting:
            # All of it came late, and before somebody else was given the trial.
            waiting.remove(trial.trial_id)
        self._count_end(self.trials[trial.trial_id])
        # KerasTuner saves while the trial still counts as ongoing.
        self.save()

    def requeue_all(self) -> None:
        """Takes the trials of workers that were asked to stop."""
        for tuner_id in list(self.ongoing_trials):
            self.requeue(tuner_id)

    @keras_tuner.synchronized
    def requeue(self, tuner_id: str, reason: str | None = None) -> str | None:
        """Takes the trial of a worker that is gone, for another one to go on with; returns its id.

        The reason is what it died of, None if it was asked to stop.
        """
        self.tuner_ids.discard(tuner_id)
        self._last_heard.pop(tuner_id, None)
        trial = self.ongoing_trials.pop(tuner_id, None)
        if trial is None:
            return None
        self._requeue_trial(trial, reason)
        self.save()
        return trial.trial_id

    @keras_tuner.synchronized
    def unresponsive_workers(self, seconds: float) -> list[str]:
        """Returns the workers that gave no sign of life for so long."""
        now = time.monotonic()
        return [
            tuner_id
            for tuner_id in sorted({*self.ongoing_trials, *self.tuner_ids})
            if now - self._last_heard.get(tuner_id, now) > seconds
        ]

    @keras_tuner.synchronized
    def is_over(self) -> bool:
        """Returns whether no worker has a trial or waits for one, and none is left to be redone."""
        # A search that ended early leaves what is to be redone to the one that resumes it.
        left = keras_tuner_internals.waiting_trials(self) and not self.failure
        return not (self.ongoing_trials or self.tuner_ids or left)

    def ended(self) -> list[Trial]:
        """Returns the trials that ended, the best first, the failed last."""
        ended = [self.trials[trial_id] for trial_id in self.end_order]
        return sorted(ended, key=lambda trial: 1.0 if trial.score is None else -trial.score)

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        state = {
            "oracle": self.get_state(),
            "trials": [trial.get_state() for trial in self.trials.values()],
            "deaths": self._deaths,
        }
        try:
            files.write_text(self._file, json.dumps(state))
        except OSError as error:
            # Raised here it would leave the lock locked, and a chief that answers nobody.
            self.failure = f"can't write '{self._file}': {error.strerror}"

    def reload(self) -> bool:
        """Reads what a search left, and returns whether there was something.

        The unfinished trials go on. A damaged file is an `InputError`.
        """
        if not self._file.is_file():
            return False
        state = files.read_json("run_dir", self._file)
        try:
            trials = [Trial.from_state(trial) for trial in state["trials"]]
            self.trials = {trial.trial_id: trial for trial in trials}
            self._deaths = dict(state["deaths"])
            self.set_state(state["oracle"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise files.damaged("run_dir", self._file) from None
        ongoing = list(self.ongoing_trials.values())
        self.ongoing_trials.clear()
        for trial in ongoing:
            if trial.trial_id not in self.end_order:
                self._requeue_trial(trial, "its process died")
        return True

    def _requeue_trial(self, trial: Trial, reason: str | None) -> None:
        trial.metrics = type(trial.metrics)()
        places = self._config.trial_folder(trial.trial_id).glob("seed-*/checkpoints")
        if reason is not None and not any(CheckpointFolder(place).exist() for place in places):
            self._deaths[trial.trial_id] = self._deaths.get(trial.trial_id, 0) + 1
        if self._deaths.get(trial.trial_id, 0) >= _MOST_DEATHS:
            trial.status = TrialStatus.FAILED
            trial.message = f"{reason}, {_MOST_DEATHS} times before its first checkpoint"
            self.end_order.append(trial.trial_id)
            self._count_end(trial)
        else:
            keras_tuner_internals.waiting_trials(self).append(trial.trial_id)

    def _count_end(self, trial: Trial) -> None:
        if trial.status == TrialStatus.FAILED:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= self._config.max_failures:
                self.failure = f"the last {self._failures_in_a_row} trials failed"
        else:
            self._failures_in_a_row = 0
        self.unreported.append(trial.trial_id)

    def _save_trial(self, trial: Trial) -> None:
        # All are in oracle.json.
        pass


class Random(DurableOracle, keras_tuner.oracles.RandomSearchOracle):
    """Random search."""


class Bayesian(DurableOracle, keras_tuner.oracles.BayesianOptimizationOracle):
    """Bayesian optimisation, after a third of the trials at random, of a search that resumes."""

    def __init__(self, config: SearchConfig, space: keras_tuner.HyperParameters):
        # KerasTuner's three a dimension would be most of a usual search.
        most = max(3, 2 * len(space.space))
        third = (config.most_trials() or 0) // 3
        super().__init__(config, space, num_initial_points=max(2, min(most, third)))

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Proposes values that depend on the seed and the trials before alone."""
        state = np.random.RandomState([self.seed, len(self.trials)])
        keras_tuner_internals.set_random_state(self, state)
        with warnings.catch_warnings():
            # Few trials fit many length scales: of no use to who searches.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return super().populate_space(trial_id)

    def _vectorize_trials(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the trials were in the space, and how bad.

        A failed trial is as bad as the worst of the others. KerasTuner leaves it out: then the next
        proposal is where the failed one was, and fails, until all trials are used up.
        """
        places, losses = super()._vectorize_trials()
        space = [
            parameter
            for parameter in self.hyperparameters.space
            if not isinstance(parameter, Fixed)
        ]
        failed = [
            [
                parameter.value_to_prob(values.values.get(parameter.name, parameter.default))
                for parameter in space
            ]
            for values in (
                trial.hyperparameters
                for trial in self.trials.values()
                if trial.status in (TrialStatus.FAILED, TrialStatus.INVALID)
            )
        ]
        if not failed:
            return places, losses
        return np.vstack([places, failed]), np.append(losses, [losses.max()] * len(failed))


class Hyperband(DurableOracle, keras_tuner.oracles.HyperbandOracle):
    """Hyperband; with a number of trials it takes brackets that they are enough for."""

    def __init__(self, config: SearchConfig, space: keras_tuner.HyperParameters):
        super().__init__(
            config,
            space,
            max_epochs=config.longest_trial(),
            factor=FACTOR,
            # None: round after round, until the trials are used up.
            hyperband_iterations=None if config.most_trials() else 1,
        )

    def _start_new_bracket(self) -> None:
        if self._most_trials is not None:
            keras_tuner_internals.lower_bracket(self, self._most_trials - len(self.trials))
        super()._start_new_bracket()


_ORACLES = {"bayesian": Bayesian, "hyperband": Hyperband, "random": Random}


def create(config: SearchConfig, space: keras_tuner.HyperParameters) -> DurableOracle:
    """Returns a configuration's oracle for a space in which all that is searched is declared."""
    return _ORACLES[config.tuner](config, space)
