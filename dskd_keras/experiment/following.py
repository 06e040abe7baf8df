"""What a process does that follows: it takes part in each training, and keeps nothing of it."""

from rich.console import Console

from dskd_keras.experiment import build, devices, hosts, students, teachers
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.run import Run


def follow(config: ExperimentConfig) -> None:
    """Takes part in what process 0 trains until that has ended; prints and writes nothing.

    Raises:
        InputError: The images can't be read here, or the devices can't be used.
        TrainingError: A training could not go on.
    """
    quiet = Console(quiet=True)
    found = devices.find(config)
    run = Run(config, build.load_data(config, quiet), quiet, devices=found)
    while (job := hosts.here().hear()) is not None:
        if job["trains"] == "teacher":
            teachers.follow(run)
        else:
            students.follow(run, job["seed"])
