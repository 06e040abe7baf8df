"""The configuration of a run: one dataclass, read from YAML files and flags."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jsonargparse
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
        for field, least in at_least.items():
            value = getattr(self, field)
            if value is not None and value < least:
                raise InputError(f"{field} should be at least {least}. Received: {value}.")
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
        if self.method == "dskd" and not self.student_layers:
            raise InputError(
                "student_layers: empty, but method is dskd. Name the layers to supervise, or "
                "choose method kd."
            )

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


def parse(config_class: type, argv: Sequence[str], configs: Path, command: str):
    """Reads a configuration from flags and YAML files.

    `--pair NAME`, in upper or lower case, reads `configs/NAME.yaml`, `--config FILE` any other file
    on top of it, and other flags come on top of both, in whatever order they are given.

    Args:
        config_class: `ExperimentConfig`, or a dataclass derived from it.
        argv: The command's arguments.
        configs: Folder of the pairs' files.
        command: The command's name, for `--help`.

    Returns:
        A `config_class`.

    Raises:
        InputError: An unknown pair, field or value; the message is one line.
        SystemExit: After `--help` or `--print_config`.
    """
    argv = _complete(config_class, argv)
    parser = jsonargparse.ArgumentParser(
        prog=command,
        description=(config_class.__doc__ or "").partition("\n")[0],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of these fields.")
    parser.add_class_arguments(config_class, as_group=False)
    wanted = _value_of("pair", argv)
    if wanted is not None:
        pairs = {path.stem.casefold(): path.stem for path in sorted(configs.glob("*.yaml"))}
        pair = pairs.get(wanted.casefold())
        if pair is None:
            raise unknown_name("pair", wanted, pairs.values())
        parser.default_config_files = [str(configs / f"{pair}.yaml")]
    try:
        # A file read later would overrule the flags before it.
        values = parser.parse_args(_files_first(argv)).as_dict()
    except (jsonargparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise _one_line(config_class, str(error)) from None
    if wanted is not None:
        values["pair"] = pair  # as the file spells it
    fields = [field.name for field in dataclasses.fields(config_class)]
    return config_class(**{name: values[name] for name in fields})


def _complete(config_class, argv):
    """Allows `--seeds 0 1 2` for lists and a bare `--nesterov` for switches."""
    kinds = typing.get_type_hints(config_class)
    completed, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        completed.append(argument)
        kind = kinds.get(argument.removeprefix("--")) if argument.startswith("--") else None
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if typing.get_origin(kind) is list and not (values and values[0].startswith("[")):
            values = [f"[{', '.join(values)}]"]
        if kind is bool and not values:
            values = ["true"]
        completed += values
    return completed


def _value_of(field, argv):
    for position, argument in enumerate(argv):
        if argument == f"--{field}" and position + 1 < len(argv):
            return argv[position + 1]
        if argument.startswith(f"--{field}="):
            return argument.partition("=")[2]
    return None


def _files_first(argv):
    first, rest, argv = [], [], list(argv)
    while argv:
        argument = argv.pop(0)
        if argument == "--config" and argv:
            first += [argument, argv.pop(0)]
        elif argument.startswith("--config="):
            first.append(argument)
        else:
            rest.append(argument)
    return first + rest


def _one_line(config_class, message):
    """Turns what the parser says into one line with the field, the value and the choices."""
    hints = typing.get_type_hints(config_class)
    if unknown := re.search(r"Option '([^']+)' is not accepted", message):
        return unknown_name("configuration", unknown[1], hints)
    if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        return unknown_name("option", unknown[1], [f"--{name}" for name in hints])
    wrong = re.search(r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL)
    if wrong and wrong[1] in hints:
        field, value = wrong.groups()
        kind = hints[field]
        if typing.get_origin(kind) is list and typing.get_origin(typing.get_args(kind)[0]):
            kind = typing.get_args(kind)[0]  # of names to choose from
        if typing.get_origin(kind) is Literal:
            return unknown_name(field, value.strip(), typing.get_args(kind))
        return InputError(f"{field} should be {_kind_name(kind)}. Received: {value.strip()!r}.")
    if missing := re.search(r"arguments are required: (\w+)", message):
        return InputError(f"{missing[1]}: not given. Choose a pair (--pair NAME) or name a model.")
    message = message.replace("Problems parsing config:", "config: not valid YAML:")
    message = message.replace('in "<unicode string>", ', "").replace(
        'Parser key "config"', "config"
    )
    return InputError(" ".join(message.split()))


def _kind_name(kind):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
    if isinstance(kind, types.UnionType):
        return " or ".join(
            "null" if part is type(None) else _kind_name(part) for part in typing.get_args(kind)
        )
    if typing.get_origin(kind) is list:
        return f"a list, each of it {_kind_name(typing.get_args(kind)[0])}"
    return names.get(kind, str(kind))
