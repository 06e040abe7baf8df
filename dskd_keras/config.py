"""The configurations of both commands, checked."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Literal

import yaml

from dskd_keras.errors import InputError, unknown_name


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Trains a student, under a teacher or alone.

    Args:
        teacher: Name of the teacher's model.
        student: Name of the student's model.
        pair: Name of the file in configs/ that the other values came from.
        method: dskd supervises the student's shallow layers too, kd its output alone, ce trains it
            on the labels without a teacher.
        dataset: digits, cifar100, tiny_imagenet, the name of any image-classification set of
            TensorFlow Datasets, an .npz file with x_train, y_train, x_test and y_test, or a folder
            of class folders.
        data_dir: Where TensorFlow Datasets keeps its data; for tiny_imagenet also its zip archive,
            the folder that it extracts to, or a folder with either. Default: TFDS_DATA_DIR, else
            its own.
        image_size: Side in pixels to which all images are resized. Default: as they are.
        train_examples: Train on that many images only, the same share of every class.
        validation_fraction: Share of the training images held out to choose the best epoch.
        augmentation: auto is what suits the data set: crop_flip, or crop where a mirror image is
            another class.
        student_layers: The student's shallow layers that dskd supervises.
        teacher_layer: The teacher's layer that supervises them. Default: the last feature map
            before the pooling.
        temperature: Softens the logits of teacher and student.
        label_weight: Coefficient of the loss on the labels.
        prediction_weight: Coefficient of the divergence of the student's output.
        deep_prediction_weight: Coefficient of the divergences of the shallow layers.
        deep_feature_weight: Coefficient of the feature-map losses of the shallow layers.
        weighting: How the shallow layers share those: softmax, proportional, inverse or uniform.
        weighting_temperature: Sharpness of the softmax weighting: smaller is sharper.
        dtype_policy: Precision of the student's training; variables and losses stay float32, and
            mixed_float16 scales the loss. A teacher is trained in float32.
        epochs: Epochs of the student.
        batch_size: Images in a step.
        learning_rate: Of the student, at the start.
        schedule: step multiplies the rate by decay_factor at each of decay_at, cosine takes it
            to zero.
        decay_at: Where the rate falls, as shares of the training.
        decay_factor: By how much.
        momentum: Of stochastic gradient descent.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: Added to the gradient, as in PyTorch's SGD.
        seeds: A run for each; all share the teacher.
        teacher_weights: A .keras or .weights.h5 file, or a published PyTorch checkpoint (.pth), to
            load instead of training the teacher.
        teacher_epochs: Epochs of a teacher that has to be trained. Default: as many as the student.
        teacher_learning_rate: Of such a teacher. Default: the student's.
        teacher_seed: Seed of such a teacher.
        teacher_dir: Where trained teachers are kept.
        fold_teacher: Fold the teacher's batch normalisations into its convolutions before it
            teaches: the same outputs but for rounding, and faster.
        teacher_dtype: Precision in which it then teaches; its outputs are float32. bfloat16 and
            float16 pay on a processor or an accelerator that computes in them.
        min_teacher_accuracy: A teacher with a lower test accuracy (0 to 1) is refused.
        run_dir: Where the run is written. Default: runs/ and the pair's name.
        include_preprocessing: Save the student with the normalisation inside, so that it takes
            pixels from 0 to 255.
        export: Formats in which to save the student too, for use without Keras.
        resume: Go on with an interrupted run, to the numbers of an uninterrupted one; a run that
            was not begun is begun.
        checkpoint_steps: Steps between two checkpoints within an epoch; there is one after every
            epoch too.
    """

    teacher: str
    student: str
    pair: str | None = None
    method: Literal["dskd", "kd", "ce"] = "dskd"
    dataset: str = "cifar100"
    data_dir: str | None = None
    image_size: int | None = None
    train_examples: int | None = None
    validation_fraction: float = 0.0
    augmentation: Literal["auto", "crop_flip", "crop", "none"] = "auto"
    student_layers: list[str] = dataclasses.field(default_factory=lambda: ["stage1", "stage2"])
    teacher_layer: str | None = None
    temperature: float = 4.0
    label_weight: float = 1.0
    prediction_weight: float = 1.0
    deep_prediction_weight: float = 1.0
    deep_feature_weight: float = 1.0
    weighting: Literal["softmax", "proportional", "inverse", "uniform"] = "softmax"
    weighting_temperature: float = 1.0
    dtype_policy: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    epochs: int = 240
    batch_size: int = 64
    learning_rate: float = 0.05
    schedule: Literal["step", "cosine"] = "step"
    decay_at: list[float] = dataclasses.field(default_factory=lambda: [0.625, 0.75, 0.875])
    decay_factor: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    teacher_weights: str | None = None
    teacher_epochs: int | None = None
    teacher_learning_rate: float | None = None
    teacher_seed: int = 0
    teacher_dir: str = "runs/teachers"
    fold_teacher: bool = True
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    min_teacher_accuracy: float = 0.0
    run_dir: str | None = None
    include_preprocessing: bool = False
    export: list[Literal["onnx", "saved_model", "litert"]] = dataclasses.field(default_factory=list)
    resume: bool = False
    checkpoint_steps: int = 500

    def __post_init__(self):
        at_least = {
            "epochs": 1, "batch_size": 1, "image_size": 1, "train_examples": 1,
            "teacher_epochs": 1, "teacher_seed": 0, "checkpoint_steps": 1,
        }  # fmt: skip
        self._require_at_least(at_least)
        for field in (
            "label_weight", "prediction_weight", "deep_prediction_weight", "deep_feature_weight",
            "weight_decay",
        ):  # fmt: skip
            self._require(field, lambda value: value >= 0, "a finite number that is not negative")
        for field in ("temperature", "weighting_temperature", "decay_factor", "learning_rate"):
            self._require(field, lambda value: value > 0, "a positive number")
        if self.teacher_learning_rate is not None:
            self._require("teacher_learning_rate", lambda value: value > 0, "a positive number")
        for field in ("momentum", "validation_fraction"):
            self._require(field, lambda value: 0 <= value < 1, "at least 0 and below 1")
        self._require("min_teacher_accuracy", lambda value: 0 <= value <= 1, "from 0 to 1")
        if self.nesterov and not self.momentum:
            raise InputError("nesterov: True, but momentum is 0. Nesterov's needs some momentum.")
        if not all(0 < share < 1 for share in self.decay_at):
            raise InputError(
                "decay_at should be shares of the training between 0 and 1, such as 0.75. "
                f"Received: {self.decay_at}."
            )
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) != len(self.seeds):
            raise InputError(
                f"seeds should be different whole numbers from 0, one or more. Received: "
                f"{self.seeds}."
            )
        if self.teacher_dtype != "float32" and not self.fold_teacher:
            raise InputError(
                f"teacher_dtype: {self.teacher_dtype}, but fold_teacher is false. Folding makes "
                "the copy that has another precision: choose float32, or fold."
            )
        if self.export and self.dtype_policy != "float32":
            raise InputError(
                f"export: {', '.join(self.export)}, but dtype_policy is {self.dtype_policy}. Only "
                "a float32 student can be exported: choose dtype_policy float32, or no export."
            )
        if self.method == "dskd" and not self.student_layers:
            raise InputError(
                "student_layers: empty, but method is dskd. Name the layers to supervise, or "
                "choose method kd."
            )

    def _require_at_least(self, least):
        for field, value in ((field, getattr(self, field)) for field in least):
            if value is not None and value < least[field]:
                raise InputError(f"{field} should be at least {least[field]}. Received: {value}.")

    def _require(self, field, holds, rule):
        value = getattr(self, field)
        if not math.isfinite(value) or not holds(value):
            raise InputError(f"{field} should be {rule}. Received: {value}.")

    def folder(self) -> Path:
        """Returns the run's folder."""
        return Path(self.run_dir or f"runs/{self.pair or f'{self.teacher}_{self.student}'}")

    def to_yaml(self) -> str:
        """Returns the YAML that `--config` reads back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


_WEIGHTINGS = Literal["softmax", "proportional", "inverse", "uniform"]


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

    temperature: list[float] | None = dataclasses.field(default_factory=lambda: [1.0, 10.0])
    label_weight: list[float] | None = dataclasses.field(default_factory=lambda: [0.1, 1.0])
    prediction_weight: list[float] | None = dataclasses.field(default_factory=lambda: [0.1, 10.0])
    deep_prediction_weight: list[float] | None = dataclasses.field(
        default_factory=lambda: [0.1, 10.0]
    )
    deep_feature_weight: list[float] | None = dataclasses.field(
        default_factory=lambda: [0.1, 1000.0]
    )
    weighting: list[_WEIGHTINGS] | None = dataclasses.field(
        default_factory=lambda: list(typing.get_args(_WEIGHTINGS))
    )
    weighting_temperature: list[float] | None = dataclasses.field(
        default_factory=lambda: [0.1, 10.0]
    )
    learning_rate: list[float] | None = dataclasses.field(default_factory=lambda: [0.01, 0.1])
    student_layers: list[list[str]] | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            name = f"ranges.{field.name}"
            if not isinstance(value, list | tuple) or not len(value):
                raise InputError(
                    f"{name}: {value!r} is empty. Give {_RANGE_KINDS.get(field.name, _NUMBERS)}, "
                    "or null to keep the configured value."
                )
            if field.name not in _RANGE_KINDS:
                self._check_numbers(name, value)
            elif len({str(choice) for choice in value}) != len(value):
                raise InputError(f"{name}: a choice is there twice. Received: {value}.")
        for name in self.weighting or ():
            if name not in typing.get_args(_WEIGHTINGS):
                raise unknown_name("ranges.weighting", name, typing.get_args(_WEIGHTINGS))
        for layers in self.student_layers or ():
            if isinstance(layers, str) or not len(layers):
                raise InputError(
                    "ranges.student_layers: each choice should be a list of layers, such as "
                    f"[stage1, stage2]. Received: {layers!r}."
                )

    @staticmethod
    def _check_numbers(name, value):
        numbers = [isinstance(end, int | float) and math.isfinite(end) for end in value]
        if len(value) != 2 or not all(numbers) or min(value) <= 0:
            raise InputError(f"{name} should be {_NUMBERS}. Received: {list(value)}.")
        low, high = value
        if low > high:
            raise InputError(f"{name}: from {low} to {high} is the wrong way round.")
        if low == high:
            raise InputError(
                f"{name}: from {low} to {high} is empty. To fix it, set {name[7:]} itself and this "
                "to null."
            )

    @classmethod
    def get(cls, ranges):
        """Returns ranges given as a `SearchRanges`, as a dict of some of them, or as None.

        Raises:
            InputError: A parameter is unknown, or its range can't be used.
        """
        if isinstance(ranges, cls):
            return ranges
        names = [field.name for field in dataclasses.fields(cls)]
        for name in ranges or ():
            if name not in names:
                raise unknown_name("ranges", name, names)
        return cls(**(ranges or {}))


_NUMBERS = "two positive numbers, from and to"
_RANGE_KINDS = {"weighting": "names", "student_layers": "lists of layers"}


@dataclasses.dataclass(frozen=True)
class SearchConfig(ExperimentConfig):
    """Searches the settings of a distillation, by the accuracy on images held out of the training.

    Args:
        validation_fraction: Share of the training images held out to compare the trials by. The
            test images are for the end alone.
        resume: Go on with an interrupted search, or, with more max_trials, with a finished one.
        tuner: hyperband gives many trials few epochs and goes on with the best, bayesian learns
            from the trials before, random tries.
        max_trials: Trials at most. Default: 30; with hyperband all of its brackets once, of which a
            small number allows none that stops trials early.
        trial_epochs: Epochs of a trial, with hyperband of the longest. Default: epochs.
        ranges: What is searched, and where.
        search_seed: Of the tuner's own choices.
        cached_views: Show the student that many fixed augmented views of every image, and compute
            the teacher's outputs for them once, for all trials; 0 augments anew in every epoch and
            runs the teacher in every step.
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
    ranges: SearchRanges = dataclasses.field(default_factory=SearchRanges)
    search_seed: int = 0
    cached_views: int = 0
    workers: int = 0
    chief_timeout: float = 60.0
    worker_timeout: float = 60.0
    max_failures: int = 10
    final: bool = False

    def __post_init__(self):
        super().__post_init__()
        at_least = {
            "max_trials": 1, "trial_epochs": 1, "search_seed": 0, "cached_views": 0, "workers": 0,
            "max_failures": 1,
        }  # fmt: skip
        self._require_at_least(at_least)
        for field in ("chief_timeout", "worker_timeout"):
            self._require(field, lambda value: value > 0, "a positive number of seconds")
        if not self.validation_fraction:
            raise InputError(
                "validation_fraction: 0.0, but a search compares its trials by images held out of "
                "the training. Give a share of it, such as 0.1."
            )
        if self.method == "ce" and self.cached_views:
            raise InputError(
                f"cached_views: {self.cached_views}, but method ce has no teacher. Set it to 0."
            )

    def search_folder(self) -> Path:
        """Returns the search's folder."""
        return self.folder() / "search"

    def experiment(self, **changes) -> ExperimentConfig:
        """Returns the configuration of a training run, without what concerns the search."""
        names = [field.name for field in dataclasses.fields(ExperimentConfig)]
        values = {name: getattr(self, name) for name in names}
        # The teacher stays the one it is, whatever is changed for the student.
        values["teacher_epochs"] = self.teacher_epochs or self.epochs
        values["teacher_learning_rate"] = self.teacher_learning_rate or self.learning_rate
        return ExperimentConfig(**values | changes)
