"""The configuration of a search, checked without Keras."""

import dataclasses
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from dskd_keras import checks
from dskd_keras.data import kinds
from dskd_keras.errors import InputError, unknown_name, wrong
from dskd_keras.experiment.config import MOST_SEED, ExperimentConfig, Weighting

_NUMBERS = "two positive numbers, from and to"
_RULES = {"weighting": "a list of names", "student_layers": "a list of lists of layers"}


@dataclasses.dataclass(frozen=True)
class SearchRanges:
    """What a search tries; a parameter whose range is null keeps its configured value.

    Args:
        temperature: Two numbers, from and to, drawn evenly on a logarithmic scale, or null.
        label_weight: Two numbers, from and to, or null.
        prediction_weight: Two numbers, from and to, or null.
        deep_prediction_weight: Two numbers, from and to, or null.
        deep_feature_weight: Two numbers, from and to, or null.
        weighting: Names to choose from, or null.
        weighting_temperature: Two numbers, from and to, or null; counts where the weighting is
            softmax.
        learning_rate: Two numbers, from and to, or null.
        student_layers: Sets of shallow layers to choose from, such as [[stage1], [stage1, stage2]].
            Default: those configured.
    """

    temperature: list[float] | None = field(default_factory=lambda: [1.0, 10.0])
    label_weight: list[float] | None = field(default_factory=lambda: [0.1, 1.0])
    prediction_weight: list[float] | None = field(default_factory=lambda: [0.1, 10.0])
    deep_prediction_weight: list[float] | None = field(default_factory=lambda: [0.1, 10.0])
    deep_feature_weight: list[float] | None = field(default_factory=lambda: [0.1, 1000.0])
    weighting: list[Weighting] | None = field(
        default_factory=lambda: list(typing.get_args(Weighting))
    )
    weighting_temperature: list[float] | None = field(default_factory=lambda: [0.1, 10.0])
    learning_rate: list[float] | None = field(default_factory=lambda: [0.01, 0.1])
    student_layers: list[list[str]] | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None:
                continue
            title, rule = f"ranges.{name}", _RULES.get(name, _NUMBERS)
            if not isinstance(value, list | tuple) or not value:
                raise wrong(title, value, f"{rule}, or null to keep the configured value")
            if name not in _RULES:
                _check_ends(title, value)
            elif len({str(choice) for choice in value}) != len(value):
                raise wrong(title, value, "different choices")
        for choice in self.weighting or ():
            if choice not in typing.get_args(Weighting):
                raise unknown_name("ranges.weighting", choice, typing.get_args(Weighting))
        for layers in self.student_layers or ():
            if isinstance(layers, str) or not layers:
                raise wrong(
                    "ranges.student_layers", layers, "a list of layers, such as [stage1, stage2]"
                )

    @classmethod
    def only(cls, ranges: Mapping[str, Any]) -> "SearchRanges":
        """Returns ranges for what a dict names, so that nothing else is searched."""
        names = list(cls.__dataclass_fields__)
        for name in ranges:
            if name not in names:
                raise unknown_name("ranges", name, names)
        return cls(**dict.fromkeys(names) | dict(ranges))


def _check_ends(title: str, value: Sequence[float]) -> None:
    numbers = [isinstance(end, int | float) and math.isfinite(end) for end in value]
    if len(value) != 2 or not all(numbers) or min(value) <= 0:
        raise wrong(title, list(value), _NUMBERS)
    for end in value:
        if title == "ranges.temperature":
            checks.temperature(title, end)
        else:
            checks.real(title, end, above=0)
    low, high = value
    if low > high:
        raise wrong(title, list(value), "the smaller number first")
    if low == high:
        raise wrong(title, list(value), "a range, or null to keep the configured value")


@dataclasses.dataclass(frozen=True)
class SearchConfig(ExperimentConfig):
    """Searches the settings of a distillation, by the accuracy on images held out of the training.

    Args:
        validation_fraction: Share of the training images held out to compare the trials by. The
            test images are for the end alone.
        seeds: Each trial is trained with each; what counts is the mean of their accuracies.
        resume: Go on with an interrupted search, or, with more max_trials, with a finished one.
        tuner: hyperband gives many trials few epochs and goes on with the best, bayesian learns
            from the trials before, random tries.
        max_trials: Trials at most. Default: 30; with hyperband all of its brackets once, of which a
            small number allows none that stops trials early.
        trial_epochs: Epochs of a trial, with hyperband of the longest. Default: epochs.
        ranges: What is searched, and where.
        search_seed: Of the tuner's own choices.
        workers: Processes on this machine that run trials at the same time; 0 runs them in this
            one.
        chief_timeout: Seconds that a worker waits for its chief.
        worker_timeout: Seconds without a sign of life after which the chief gives a worker's trial
            to another.
        max_failures: The search stops when that many trials in a row have failed.
        final: Train with the best settings on all the training images in the end, and test.
    """

    validation_fraction: float = 0.1
    tuner: Literal["hyperband", "bayesian", "random"] = "bayesian"
    max_trials: int | None = None
    trial_epochs: int | None = None
    ranges: SearchRanges = field(default_factory=SearchRanges)
    search_seed: int = 0
    workers: int = 0
    chief_timeout: float = 60.0
    worker_timeout: float = 60.0
    max_failures: int = 10
    final: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole(1, "max_trials", "trial_epochs", "max_failures")
        self.check_whole(0, "workers")
        # KerasTuner takes 0 for none, so that it is given one more.
        self.check_whole(0, "search_seed", most=MOST_SEED - 1)
        for name in ("chief_timeout", "worker_timeout"):
            checks.real(name, getattr(self, name), above=0)
        if not self.validation_fraction:
            raise InputError(
                "validation_fraction: 0.0, but a search compares its trials by images held out of "
                "the training. Give a share of it, such as 0.1."
            )
        if self.devices != 1:
            raise InputError(
                f"devices: {self.devices}, but a search runs each trial on one device. Set it to "
                "1, and start more workers to use more devices."
            )
        if self.augment_on != "host":
            raise InputError(
                f"augment_on: {self.augment_on}, but a search makes its batches on the host. Set "
                "it to host, and cached_views to the number of views that are made once."
            )
        if self.method != "dskd" and self.ranges.student_layers is not None:
            raise InputError(
                f"ranges.student_layers: {self.ranges.student_layers}, but method {self.method} "
                "supervises no shallow layers. Set it to null."
            )
        if isinstance(self.teacher_layer, list) and self.ranges.student_layers is not None:
            raise InputError(
                "ranges.student_layers: searched, but teacher_layer names a layer for each. Name "
                "one for all, or set ranges.student_layers to null."
            )

    def check_files(self) -> None:
        """Raises `InputError` where a file that the configuration names is missing."""
        # A chief hands out trials: its machine need not have the data.
        if "chief" in os.environ.get("KERASTUNER_TUNER_ID", ""):
            return
        kinds.check_stream(self.dataset, self.stream)
        if not (self.search_folder() / "search.json").exists():
            self.check_teacher_file()

    def search_folder(self) -> Path:
        """Returns the folder of the search and all of its trials."""
        return self.folder() / "search"

    def trial_folder(self, trial_id: str) -> Path:
        """Returns the folder of one of the search's trials."""
        return self.search_folder() / f"trial_{trial_id}"

    def longest_trial(self) -> int:
        """Returns the epochs of a trial that trains to the end."""
        return self.trial_epochs or self.epochs

    def most_trials(self) -> int | None:
        """Returns how many trials the search makes at most, None for all that Hyperband has."""
        if self.max_trials is None and self.tuner != "hyperband":
            return 30
        return self.max_trials

    def experiment(self, **changes: Any) -> ExperimentConfig:
        """Returns the configuration of a training run, without what concerns the search."""
        values = {name: getattr(self, name) for name in ExperimentConfig.__dataclass_fields__}
        # The teacher stays the one it is, whatever is changed for the student.
        values["teacher_epochs"] = self.teacher_epochs or self.epochs
        # What is trained with the best settings sees fresh augmentation.
        values["cached_views"] = 0
        values["teacher_learning_rate"] = self.teacher_learning_rate or self.learning_rate
        return ExperimentConfig(**values | changes)
