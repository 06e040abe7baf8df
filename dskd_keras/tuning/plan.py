"""What a search tries and what has come of it, without models, so that a chief needs none."""

import json

import keras
import keras_tuner
from rich.console import Console

from dskd_keras.errors import InputError
from dskd_keras.experiment import build, run_folder
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.run import Run
from dskd_keras.tuning import oracles, ranking
from dskd_keras.tuning.config import SearchConfig
from dskd_keras.tuning.hypermodel import DistillationHyperModel

# Fields that may differ where a search goes on: they say where things are, how many trials are run
# how, and what is done in the end.
_MAY_DIFFER = (
    "pair", "data_dir", "run_dir", "teacher_dir", "export", "resume", "checkpoint_steps",
    "max_trials", "workers", "chief_timeout", "worker_timeout", "max_failures", "final",
    "include_preprocessing",
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
    """The ranges, the oracle and the folder of a search.

    Args:
        config: The configuration.
        console: For messages and the table.

    Attributes:
        config: The configuration.
        console: For messages and the table.
        folder: The search's folder.
        space: All that is searched.
        oracle: Proposes the trials and knows their results.

    Raises:
        InputError: There is nothing to search.
    """

    def __init__(self, config: SearchConfig, console: Console):
        self.config = config
        self.console = console
        self.folder = config.search_folder()
        self._hypermodel = hypermodel(config)
        self.space = keras_tuner.HyperParameters()
        self._hypermodel.declare_hyperparameters(self.space)
        if not self.space.space:
            raise InputError(
                f"ranges: nothing is left to search with method {config.method}. Give one a range."
            )
        self.oracle = oracles.create(config, self.space)

    def describe(self) -> str:
        """Returns a line on what is searched."""
        most, epochs = self.config.most_trials(), self.config.longest_trial()
        trials = "trials until Hyperband is through" if most is None else f"up to {most} trials"
        searched = ", ".join(parameter.name for parameter in self.space.space)
        text = f"Searching {searched}: {self.config.tuner}, {trials} of {epochs} epoch(s)"
        if isinstance(self.oracle, oracles.Hyperband) and most is not None:
            needed = self.oracle.least_trials_to_stop_some()
            if epochs < oracles.FACTOR:
                text += (
                    f". Hyperband stops none early: give --trial_epochs {oracles.FACTOR} or more"
                )
            elif most < needed:
                text += f". Hyperband stops some early only from --max_trials {needed} on"
        return text

    def check_configuration(self) -> None:
        """Raises `InputError` if the folder holds a search of another configuration."""
        run_folder.check_configuration(self.config, self.folder, _MAY_DIFFER)

    def is_finished(self) -> bool:
        """Returns whether the folder holds a finished search with all trials that are asked for.

        Raises:
            InputError: It holds one of another configuration, or one that is to have more trials
                and not to go on.
        """
        self.check_configuration()
        try:
            summary = json.loads((self.folder / "search.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        most, done = self.config.most_trials(), summary["trials"]
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
        return ranking.collect(self.config, self.oracle, self._hypermodel)

    def report_ended(self) -> None:
        """Says how the trials went that have ended, and writes the results so far."""
        if not self.oracle.unreported:
            return
        results = self.results()
        by_id = {result.trial: result for result in results}
        best = results[0]
        while self.oracle.unreported:
            result = by_id[self.oracle.unreported.popleft()]
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
