"""From a configuration to a search and its results: what `experiment` is to a training run."""

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path

import keras_tuner
import yaml

from dskd_keras import (
    artifacts,
    experiment,
    report,
    run_folder,
    teacher_outputs,
    training,
)
from dskd_keras.checkpoints import CheckpointFolder
from dskd_keras.config import SearchRanges
from dskd_keras.errors import InputError, TrainingError
from dskd_keras.interruption import Interrupted, StopRequest
from dskd_keras.tuning import hparams, oracles, pictures, results, workers
from dskd_keras.tuning.hypermodel import DistillationHyperModel
from dskd_keras.tuning.trials import Trials, has_checkpoint

# Fields that may differ where a search goes on: they say where things are, how many trials are run
# how, and what is done in the end.
_MAY_DIFFER = (
    "pair", "data_dir", "run_dir", "teacher_dir", "export", "resume", "checkpoint_steps",
    "max_trials", "workers", "chief_timeout", "worker_timeout", "max_failures", "final",
    "include_preprocessing",
)  # fmt: skip
# KerasTuner's name for a tuner without a chief.
_ALONE = "tuner0"
_NOTHING = SearchRanges(**{field.name: None for field in dataclasses.fields(SearchRanges)})


def run(config, console=None, command=None, worker_command=None):
    """Searches, alone, as the chief of workers, or as one of them.

    Which one follows from `config.workers` and from KerasTuner's environment variables.

    Args:
        config: A `SearchConfig`.
        console: A `rich.console.Console` for messages and the table. Defaults to standard output.
        command: The command line that asked for it, to be kept with the results. Optional.
        worker_command: The command line that starts a worker of the same search, a list; needed
            with `config.workers`.

    Returns:
        A list of `results.TrialResult`, the best first; `[]` in a worker.

    Raises:
        InputError: Before any training, if the configuration, the data or the folder can't be used.
        KeyboardInterrupt: The search was stopped; `resume` goes on.
        TrainingError: It could not go on.
    """
    console = console or report.console()
    experiment.check_names(config)
    role = workers.role()
    if role == "worker":
        return _work(config, console)
    folder = config.search_folder()
    search = _Search(config, folder, console)
    known = _known(config, folder)
    if known is not None and (config.resume is False or search.is_complete(known)):
        search.check_number(known)
        console.print(f"This search was finished before: {folder}")
        search.oracle.reload()
        return _finish(search, command)
    dataset = None
    if role is None and not config.workers:
        # Builds everything once: what doesn't fit is said before a teacher trains for hours.
        dataset = _load(config, console)
    artifacts.check_writable("run_dir", folder)
    with contextlib.ExitStack() as claims:
        claims.enter_context(artifacts.disk_errors_in_one_line(folder))
        claims.enter_context(run_folder.claimed("run_dir", folder))
        if not config.resume and (aside := run_folder.set_aside(folder)) is not None:
            console.print(
                f"An interrupted search was set aside: {aside} (--resume would have gone on)."
            )
        if search.oracle.reload():
            search.oracle.news.clear()
            console.print(f"Continuing after {len(search.oracle.ended())} trial(s).")
        else:
            if config.resume:
                console.print(f"There is nothing to resume in '{folder}': a new search begins.")
            artifacts.write_text(folder / "config.yaml", config.to_yaml())
        console.print(search.describe())
        begin = time.perf_counter()
        try:
            if dataset is None:
                _lead(search, worker_command if role is None else None)
            else:
                _search_alone(search, dataset)
        except InputError:
            if not search.oracle.trials:
                # What is mended now is another configuration, and the folder is free for it.
                _forget(folder)
            raise
        if search.oracle.failure:
            raise TrainingError(
                f"the search stopped: {search.oracle.failure}. See '{folder}/trials.csv'; "
                "--resume goes on."
            )
        return _finish(search, command, time.perf_counter() - begin)


class _Search:
    """What is searched: ranges, oracle and folder; without models, so that a chief needs none."""

    def __init__(self, config, folder, console):
        self.config = config
        self.folder = folder
        self.console = console
        self.epochs = config.trial_epochs or config.epochs
        self.hypermodel = hypermodel(config, None, None)
        self.space = keras_tuner.HyperParameters()
        self.hypermodel.declare_hyperparameters(self.space)
        if not self.space.space:
            raise InputError(
                f"ranges: nothing is left to search with method {config.method}. Give one a range."
            )
        self.oracle = oracles.create(config, self.epochs, self.space)
        self.oracle._set_project_dir(str(folder.parent), folder.name)
        self.oracle.begun = lambda trial_id: has_checkpoint(folder / f"trial_{trial_id}")

    def describe(self):
        """Returns a line on what is searched."""
        most = oracles.most_trials(self.config)
        trials = "trials until Hyperband is through" if most is None else f"up to {most} trials"
        searched = ", ".join(parameter.name for parameter in self.space.space)
        text = f"Searching {searched}: {self.config.tuner}, {trials} of {self.epochs} epoch(s)"
        if isinstance(self.oracle, oracles.Hyperband) and most is not None:
            needed = self.oracle.trials_to_halve()
            if self.epochs < oracles.FACTOR:
                text += (
                    f". Hyperband stops none early: give --trial_epochs {oracles.FACTOR} or more"
                )
            elif most < needed:
                text += f". Hyperband stops some early only from --max_trials {needed} on"
        return text

    def is_complete(self, known):
        """Returns whether a finished search has all the trials that are asked for."""
        most = oracles.most_trials(self.config)
        return known["max_trials"] == most or (most is not None and most <= known["trials"])

    def check_number(self, known):
        """Raises `InputError` if a finished search is to have more trials, but not to go on."""
        if not self.is_complete(known):
            raise InputError(
                f"max_trials: the search in '{self.folder}' was finished with {known['trials']} "
                f"trials. --resume goes on to {oracles.most_trials(self.config)}."
            )

    def report_news(self):
        """Says how the trials went that have ended, and writes the results so far."""
        if not self.oracle.news:
            return
        rows = results.collect(self.oracle, self.hypermodel, self.folder)
        by_id = {row.trial: row for row in rows}
        best = rows[0]
        while self.oracle.news:
            row = by_id[self.oracle.news.popleft()]
            if row.val_accuracy is None:
                self.console.print(f"Trial {row.trial} failed: {row.error}")
                continue
            seconds = "" if row.seconds is None else f" in {row.seconds:.0f} s"
            self.console.print(
                f"Trial {row.trial}: {100 * row.val_accuracy:.2f} %{seconds} (best so far "
                f"{100 * best.val_accuracy:.2f} %, trial {best.trial})"
            )
        self.write(rows)

    def write(self, rows):
        """Writes `trials.csv` and, if a trial succeeded, `best.yaml`; returns the latter's."""
        results.write_csv(self.folder / "trials.csv", rows)
        if not rows or rows[0].val_accuracy is None:
            return None
        return results.write_best(self.folder / "best.yaml", self.config, rows[0])


def hypermodel(config, dataset, teacher):
    """Returns the `DistillationHyperModel` of a configuration.

    Args:
        config: A `SearchConfig`.
        dataset: The `data.ImageDataset`.
        teacher: The teacher's model, or None.
    """
    return DistillationHyperModel(
        teacher,
        lambda: experiment.create_student(config, dataset),
        ranges=config.ranges,
        learning_rate=config.learning_rate,
        **experiment.distiller_settings(config),
    )


def _load(config, console):
    """Loads the data and builds a distiller of every kind that a trial may need."""
    dataset = experiment.load_data(config, console)
    if config.teacher_weights and not Path(config.teacher_weights).is_file():
        raise InputError(f"teacher_weights: there is no file '{config.teacher_weights}'.")
    teacher = experiment.create_teacher(config, dataset)
    choices = [config.student_layers] if config.method == "dskd" else [()]
    if config.method == "dskd" and config.ranges.student_layers is not None:
        choices = config.ranges.student_layers
    for layers in choices:
        one = dataclasses.replace(
            config, ranges=_NOTHING, **({"student_layers": layers} if layers else {})
        )
        hypermodel(one, dataset, teacher).distiller(keras_tuner.HyperParameters())
    return dataset


def _known(config, folder):
    """Returns what a finished search says of itself; None if there is none to be found.

    Raises:
        InputError: The folder holds a search of another configuration.
    """
    run_folder.check_configuration(config, folder, _MAY_DIFFER)
    try:
        return json.loads((folder / "search.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _forget(folder):
    for name in ("config.yaml", "environment.yaml"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "teacher", ignore_errors=True)


def _search_alone(search, dataset):
    trials = _trials(search, dataset)
    try:
        trials.search()
    except KeyboardInterrupt:
        search.oracle.abandon(_ALONE)
        search.console.print("Interrupted; --resume goes on.")
        raise


def _lead(search, worker_command):
    """Serves the oracle; with a command it starts workers of its own."""
    config = search.config
    address = None if worker_command is None else "127.0.0.1:0"
    with StopRequest(
        lambda: search.console.print("Stopping the workers; once more to stop at once.")
    ) as stop:
        chief = workers.Chief(search.oracle, config.worker_timeout, search.console, address)
        local = None
        if worker_command is not None:
            local = workers.LocalWorkers(
                config.workers, worker_command, chief, search.oracle, search.folder, search.console
            )
        else:
            search.console.print(f"Waiting for workers at port {chief.port}.")

        def look():
            search.report_news()
            if local is not None:
                local.watch()

        try:
            chief.serve(stop, look)
        finally:
            if local is not None:
                local.end()
            for tuner_id in list(search.oracle.ongoing_trials):
                search.oracle.abandon(tuner_id)
        if stop.signum is not None:
            search.console.print("Interrupted; --resume goes on.")
            raise Interrupted(stop.signum)


def _work(config, console):
    """Runs trials for a chief."""
    dataset = _load(config, console)
    run_folder.check_configuration(config, config.search_folder(), _MAY_DIFFER)
    search = _Search(config, config.search_folder(), console)
    workers.find_chief(config.chief_timeout)
    with workers.chief_errors_in_one_line(), artifacts.disk_errors_in_one_line(search.folder):
        _trials(search, dataset).search()
    return []


def _trials(search, dataset):
    config, console = search.config, search.console
    teacher = _teacher(search, dataset)
    _check_environment(search, dataset, teacher)
    cached = None
    if teacher is not None and config.cached_views:
        augmentation = training.augmentation(config, dataset)
        views = teacher_outputs.fixed_views(dataset, config.cached_views, augmentation)
        key = teacher_outputs.key(teacher, config.teacher_layer, dataset, augmentation)
        folder = (
            Path(config.teacher_dir) / f"{teacher.name}-{Path(dataset.name).stem}-{key}.outputs"
        )
        outputs = teacher_outputs.compute(
            teacher, config.teacher_layer, views, folder, console,
            lambda: console.print("Waiting for another process, which runs the teacher."),
        )  # fmt: skip
        cached = views, outputs
    return Trials(
        search.oracle,
        hypermodel(config, dataset, teacher),
        config,
        search.epochs,
        dataset,
        cached,
        console,
        search.report_news,
    )


def _teacher(search, dataset):
    """Returns the teacher's model, evaluated once in a search; None where none is needed."""
    config, console = search.config, search.console
    if config.method == "ce":
        return None
    place = search.folder / "teacher"
    place.mkdir(parents=True, exist_ok=True)

    def waiting():
        console.print("Waiting for another process, which prepares the teacher.")

    with artifacts.locked("run_dir", place, waiting):
        if (place / "metrics.json").is_file():
            model, _, _ = experiment.load_teacher(config.experiment(), dataset, console)
            return experiment.ready_to_teach(config, model)
        teacher = experiment.obtain_teacher(config.experiment(), dataset, console)
        text = json.dumps(dataclasses.asdict(teacher.result), indent=1) + "\n"
        artifacts.write_text(place / "metrics.json", text)
        return teacher.model


def _check_environment(search, dataset, teacher):
    """Makes sure that all trials have the same backend, images and teacher."""
    here = training.environment(dataset)
    if teacher is not None:
        here["teacher"] = teacher_outputs.key(teacher, None, dataset, None)
    path = search.folder / "environment.yaml"
    if path.is_file():
        training.check_environment(search.folder, yaml.safe_load(path.read_text()), here)
    else:
        artifacts.write_text(path, yaml.safe_dump(here))


def _finish(search, command, seconds=None):
    """Writes and shows the results; then the final run, if it is asked for."""
    config, folder, console = search.config, search.folder, search.console
    search.report_news()
    rows = results.collect(search.oracle, search.hypermodel, folder)
    best = search.write(rows)
    for name, draw in (
        ("parameters.png", pictures.parameters),
        ("progress.png", pictures.progress),
    ):
        if (png := draw(rows)) is not None:
            artifacts.write_bytes(folder / name, png)
    ranges = dataclasses.asdict(config.ranges)
    searched = {parameter.name: ranges[parameter.name] for parameter in search.space.space}
    if seconds is not None:
        hparams.write_experiment(folder, searched)
        summary = {
            "trials": len(rows),
            "max_trials": oracles.most_trials(config),
            "seconds": seconds,
            "command": command,
        }
        artifacts.write_text(folder / "search.json", json.dumps(summary, indent=1) + "\n")
        if oracles.most_trials(config) is None:
            # Hyperband is through all its brackets and goes on with none of them.
            for place in folder.glob("trial_*/seed-*/checkpoints"):
                CheckpointFolder(place).clear()
    console.print(results.table(rows, f"{config.dataset}, {config.method}, {config.tuner}"))
    if best is None:
        raise TrainingError(f"no trial succeeded. See '{folder}/trials.csv'.")
    console.print(f"Best settings: {folder / 'best.yaml'}")
    if config.final:
        console.print("Training with them on all the training images", style="bold")
        experiment.run(dataclasses.replace(best, resume=True), console, command)
    else:
        console.print(f"Train with them: python train.py --config {folder / 'best.yaml'}")
    return rows
