"""What a search tries and what has come of it, without models, so that a chief needs none."""

from typing import Any

import keras
import keras_tuner
import msgspec
from keras_tuner.engine.trial import Trial
from rich.console import Console

from dskd_keras import files
from dskd_keras.errors import InputError
from dskd_keras.experiment import build, run_folder
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.run import Run
from dskd_keras.tuning import keras_tuner_internals, oracles, ranking
from dskd_keras.tuning.config import SearchConfig
from dskd_keras.tuning.hypermodel import DistillationHyperModel

# Fields that may differ where a search goes on: they say where things are, how many trials are run
# how, and what is done in the end.
_MAY_DIFFER = (
    "pair", "data_dir", "run_dir", "teacher_dir", "export", "resume", "checkpoint_steps",
    "max_trials", "workers", "chief_timeout", "worker_timeout", "max_failures", "final",
    "include_preprocessing", "devices",
)  # fmt: skip


def hypermodel(
    config: SearchConfig, run: Run | None = None, teacher: keras.Model | None = None
) -> DistillationHyperModel:
    """Returns the hypermodel of a configuration; without a run it can't build models."""

    def student() -> keras.Model:
        assert run is not None
        return build.create_student(run)

    return DistillationHyperModel(
        teacher,
        student,
        ranges=config.ranges,
        learning_rate=config.learning_rate,
        **build.distiller_settings(config),
    )


class SearchPlan:
    """What is searched, the oracle, which knows the trials' results, and the folder."""

    def __init__(self, config: SearchConfig, console: Console):
        self.config = config
        self.console = console
        self.folder = config.search_folder()
        self._hypermodel = hypermodel(config)
        space = keras_tuner.HyperParameters()
        self._hypermodel.declare_hyperparameters(space)
        self.searched = [parameter.name for parameter in space.space]
        if not self.searched:
            raise InputError(
                f"ranges: nothing is left to search with method {config.method}. Give one a range."
            )
        self.oracle = oracles.create(config, space)
        self._read: dict[str, ranking.TrialResult] = {}

    def describe(self) -> str:
        """Returns a line on what is searched."""
        most, epochs = self.config.most_trials(), self.config.longest_trial()
        trials = "trials until Hyperband is through" if most is None else f"up to {most} trials"
        searched = ", ".join(self.searched)
        text = f"Searching {searched}: {self.config.tuner}, {trials} of {epochs} epoch(s)"
        if isinstance(self.oracle, oracles.Hyperband) and most is not None:
            # Of the smallest bracket that stops some of its trials.
            needed = keras_tuner_internals.trials_of_bracket(self.oracle, 1)
            if epochs < oracles.FACTOR or most < needed:
                text += (
                    f". Hyperband stops some early only from --trial_epochs {oracles.FACTOR} and "
                    f"--max_trials {needed} on"
                )
        return text

    def check_configuration(self) -> None:
        """Raises `InputError` if the folder holds a search of another configuration."""
        run_folder.check_configuration(self.config, self.folder, _MAY_DIFFER)

    def is_finished(self) -> bool:
        """Returns whether the folder holds a finished search with all trials that are asked for.

        One of another configuration, or one that is to have more trials without `resume`, is an
        `InputError`.
        """
        self.check_configuration()
        path = self.folder / "search.json"
        if not path.exists():
            return False
        summary = files.read_json("run_dir", path)
        most, done = self.config.most_trials(), summary.get("trials")
        if "max_trials" not in summary or not isinstance(done, int):
            raise files.damaged("run_dir", path)
        if summary["max_trials"] == most or (most is not None and most <= done):
            return True
        if not self.config.resume:
            raise InputError(
                f"max_trials: the search in '{self.folder}' was finished with {done} trials. "
                f"--resume goes on to {most}."
            )
        return False

    def results(self) -> list[ranking.TrialResult]:
        """Returns the trials that ended, the best first, the failed last."""
        return [
            self._read.get(trial.trial_id) or self._result(trial) for trial in self.oracle.ended()
        ]

    def _result(self, trial: Trial) -> ranking.TrialResult:
        folder = self.config.trial_folder(trial.trial_id)
        path = folder / ("error.txt" if trial.score is None else ranking.RESULT)
        # Another machine's file may come late.
        is_there = path.is_file()
        measured: dict[str, Any] = {}
        if trial.score is None:
            # KerasTuner's protocol hands on no message from a worker.
            text = path.read_text(encoding="utf-8") if is_there else trial.message or ""
            measured["error"] = (text.strip().splitlines() or ["unknown"])[-1]
        elif is_there:
            measured = files.read_json("run_dir", path)
        # KerasTuner's is a number of NumPy.
        measured["val_accuracy"] = None if trial.score is None else float(trial.score)
        values = self._hypermodel.values(trial.hyperparameters)
        known = {"trial": trial.trial_id, "values": values, **measured}
        try:
            result = msgspec.convert(known, ranking.TrialResult)
        except msgspec.ValidationError:
            raise files.damaged("run_dir", path) from None
        if is_there:
            # A trial ends once: a report of thousands need not read them all again.
            self._read[trial.trial_id] = result
        return result

    def report_ended(self) -> None:
        """Says how the trials went that have ended, and writes the results so far."""
        unreported = self.oracle.unreported
        # Before the results: while these are read, other trials of a chief end.
        ended = [unreported.popleft() for _ in range(len(unreported))]
        if not ended:
            return
        results = self.results()
        by_id = {result.trial: result for result in results}
        best = results[0]
        for trial_id in ended:
            result = by_id[trial_id]
            if result.val_accuracy is None or best.val_accuracy is None:
                self.console.print(f"Trial {result.trial} failed: {result.error}")
                continue
            seconds = "" if result.seconds is None else f" in {result.seconds:.0f} s"
            self.console.print(
                f"Trial {result.trial}: {100 * result.val_accuracy:.2f} %{seconds} (best so far "
                f"{100 * best.val_accuracy:.2f} %, trial {best.trial})"
            )
        self.write(results)

    def write(self, results: list[ranking.TrialResult]) -> ExperimentConfig | None:
        """Writes `trials.csv` and, if a trial succeeded, `best.yaml`; returns the latter's."""
        ranking.write_csv(self.folder / "trials.csv", results)
        if not results or results[0].val_accuracy is None:
            return None
        return ranking.write_best(self.folder / "best.yaml", self.config, results[0])
