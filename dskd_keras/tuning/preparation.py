"""What a process needs to run trials: images, teacher, cached outputs."""

import keras
import yaml
from rich.console import Console

from dskd_keras import files
from dskd_keras.experiment import build, cached_targets, run_folder, teachers, training
from dskd_keras.experiment.run import Run
from dskd_keras.tuning import plan
from dskd_keras.tuning.config import SearchConfig
from dskd_keras.tuning.trials import Trials


def load(config: SearchConfig, console: Console, command: str | None = None) -> Run:
    """Loads the images, and builds a distiller of every kind that a trial may need.

    What doesn't fit is so said before a teacher trains for hours.

    Raises:
        InputError: The data or the models can't be used.
    """
    run = Run(config.experiment(), build.load_data(config, console), console, command)
    teacher = build.create_teacher(run)
    for layers in config.ranges.student_layers or [config.student_layers]:
        build.distiller(run.replace(student_layers=layers), teacher, build.create_student(run))
    return run


def trials(search: plan.SearchPlan, run: Run) -> Trials:
    """Returns what runs trials, after the teacher is there and its outputs are cached.

    Args:
        search: What is searched.
        run: What `load` returned.

    Raises:
        InputError: The teacher can't be used, or the search was begun under other conditions.
    """
    teacher = _teacher(search, run)
    _check_conditions(search, run, teacher)
    cached = None
    if teacher is not None and search.config.cached_views:
        cached = cached_targets.obtain(run, teacher, search.config.cached_views)
    return Trials(search, run, plan.hypermodel(search.config, run, teacher), cached)


def _teacher(search: plan.SearchPlan, run: Run) -> keras.Model | None:
    """Returns the teacher as it teaches, measured once in a search; None where none is needed."""
    if run.config.method == "ce":
        return None
    folder = search.folder / "teacher"
    waiting = "Waiting for another process, which prepares the teacher."
    with run_folder.claimed("run_dir", folder, run.say, waiting):
        if (folder / "metrics.json").is_file():
            return teachers.ready_to_teach(run, teachers.load(run)[0])
        teacher = teachers.obtain(run)
        files.write_text(folder / "metrics.json", teacher.result.to_json())
        return teacher.model


def _check_conditions(search: plan.SearchPlan, run: Run, teacher: keras.Model | None) -> None:
    """Makes sure that all trials have the same backend, images and teacher."""
    here = training.conditions(run.dataset)
    if teacher is not None:
        here["teacher"] = cached_targets.key(teacher, None, run.dataset, None)
    path = search.folder / "environment.yaml"
    if path.is_file():
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
        training.check_conditions(search.folder, there, here)
    else:
        files.write_text(path, yaml.safe_dump(here))
