"""From a configuration to trained students and their report: the parts are wired here alone."""

import contextlib
from pathlib import Path

from rich.console import Console

from dskd_keras import export, files, report
from dskd_keras.experiment import build, devices, run_folder, students, teachers, training
from dskd_keras.experiment.checkpoints import CheckpointFolder
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.run import Run
from dskd_keras.report import RunResult


def run(
    config: ExperimentConfig, console: Console | None = None, command: str | None = None
) -> list[RunResult]:
    """Trains (or loads) the teacher and trains the student once for each seed.

    Args:
        config: What to run.
        console: For messages and the table. Defaults to standard output.
        command: The command line that asked for it, to be kept with the results. Optional.

    Returns:
        The teacher's result, if there is a teacher, then the students'.

    Raises:
        ExportError: A student can't be exported.
        InputError: Before any training, if the configuration or the data can't be used.
        KeyboardInterrupt: Training was stopped; `resume` goes on.
        TrainingError: Training or writing could not go on.
    """
    console = console or report.console()
    config.check_files()
    config.check_views()
    folders = {seed: config.seed_folder(seed) for seed in config.seeds}
    for folder in folders.values():
        run_folder.finished_result(config, folder)  # refuses one of another configuration
    for format in config.export:
        export.check_available(format)
    if unused := config.unused():
        console.print(f"Note: this configuration makes no use of {', '.join(unused)}.")
    found = devices.find(config)
    training.check_backend(config, found)
    run = Run(config, build.load_data(config, console), console, command, found)
    devices.check_batches(found, run.dataset, config)
    training.check_steps(run)
    # Builds everything once: what doesn't fit is said before a teacher trains for hours.
    built = build.distiller(run, build.create_teacher(run), build.create_student(run))
    if built.teacher_layer is not None and built.student_layers:
        layers = ", ".join(built.student_layers)
        if isinstance(built.teacher_layer, str):
            run.say(f"The teacher's layer {built.teacher_layer} supervises the student's {layers}.")
        else:
            of_teacher = ", ".join(built.teacher_layer)
            run.say(f"The teacher's layers {of_teacher} supervise the student's {layers}.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.disk_errors_in_one_line(config.folder()))
        for folder in folders.values():
            stack.enter_context(run_folder.claimed("run_dir", folder, run.say))
        results = _train(run, folders)
    console.print(report.results_table(f"{run.dataset.name}, {config.method}", results))
    if (sentence := report.gained(results)) is not None:
        console.print(sentence)
    for folder in folders.values():
        console.print(f"Student: {folder / 'student.keras'}")
    console.print(f"Report: {report.write([config.folder()])}")
    return results


def _train(run: Run, folders: dict[int, Path]) -> list[RunResult]:
    """Trains what is not finished, in folders that are claimed; returns the rows of the table."""
    config = run.config
    # Looked at again: before the folders were claimed another process may have finished one.
    finished = {
        seed: result
        for seed, folder in folders.items()
        if (result := run_folder.finished_result(config, folder)) is not None
    }
    for seed, folder in folders.items():
        if seed not in finished:
            if not config.resume:
                run_folder.set_aside(folder, run.say)
            # What can't be resumed is said before a teacher trains for it.
            training.checkpoint_to_resume(run, folder)
    teacher = None
    if config.method != "ce" and len(finished) < len(folders):
        teacher = teachers.obtain(run)
    results = []
    for seed, folder in folders.items():
        if seed in finished:
            run.say(f"Seed {seed} was finished before: {folder}")
            results.append(finished[seed])
        else:
            results.append(students.train(run, teacher, seed, folder))
        CheckpointFolder(folder / "checkpoints").clear()
        students.export_saved(run, folder)
    if teacher is not None:
        return [teacher.result, *results]
    of_teacher = results[0].teacher
    return results if of_teacher is None else [RunResult.from_dict(of_teacher), *results]
