"""The configuration of a training run, checked without Keras."""

import dataclasses
from pathlib import Path
from typing import Literal

import yaml

from dskd_keras import checks
from dskd_keras.data import kinds
from dskd_keras.errors import InputError, wrong
from dskd_keras.models import cards, catalog

Weighting = Literal["softmax", "proportional", "inverse", "uniform", "relative"]
PredictionLoss = Literal[
    "kl_divergence", "decoupled_kl_divergence", "dist", "standardized_kl_divergence"
]
FeatureLoss = Literal[
    "feature_mean_squared_error", "feature_normalized_mean_squared_error", "cosine_features",
    "attention_transfer",
]  # fmt: skip
Head = Literal["separable", "pointwise", "convolutional"]
# What NumPy and the backends take for a seed.
MOST_SEED = 2**32 - 1
_MOST_SEEDS = 1000
# The number of devices that takes all there are.
ALL = "all"
# Of a side.
_MOST_PIXELS = 10_000
_MOST_WORKERS = 1_000
# Of epochs, images and so on: the number of all steps has to fit into 64 bits.
_MOST = 2**31 - 1
# What kd does not read; and what ce does not read either.
_OF_LAYERS = (
    "student_layers", "teacher_layer", "deep_prediction_weight", "deep_feature_weight",
    "deep_supervision", "feature_loss", "head", "weighting", "weighting_temperature",
)  # fmt: skip
_OF_TEACHER = ("temperature", "prediction_weight", "prediction_loss")
PATHS = ("dataset", "data_dir", "teacher_weights", "teacher_dir", "run_dir")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Trains a student, under a teacher or alone.

    Args:
        teacher: Name of the teacher's model. Method ce has none.
        student: Name of the student's model.
        pair: Takes the values of configs/NAME.yaml, such as resnet56_resnet20; flags come on top.
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
        stream: Leave the images in their files and decode them when they are needed, for sets that
            are larger than the memory. Default: where they would take more than a quarter of it.
        stream_workers: Processes that decode a stream, at most 16 for each core; 0 takes threads.
            Default: one less than there are cores, and at most 16.
        augmentation: auto is what suits the data set: crop_flip, or crop where a mirror image is
            another class; resized_crop_flip from 128 pixels a side on.
        augment_on: Where batches are made. With device all training images lie in the memory of the
            accelerator, where the training step crops and mirrors them: the same bits, and nothing
            is copied in a step. For sets that fit there.
        student_layers: The student's layers that dskd supervises; auto is the last one of each
            resolution.
        teacher_layer: The teacher's layer that supervises them, or one for each of them. auto is
            the teacher's last one of the same resolution, counted from the output; null is the last
            feature map before the pooling.
        temperature: Softens the logits of teacher and student.
        label_weight: Coefficient of the loss on the labels.
        prediction_weight: Coefficient of the divergence of the student's output.
        deep_prediction_weight: Coefficient of the divergences of the shallow layers.
        deep_feature_weight: Coefficient of the feature-map losses of the shallow layers.
        deep_supervision: Share of the training in which the shallow layers are supervised; below 1
            their two coefficients fall to 0 linearly until then.
        prediction_loss: What compares logits: a loss of dskd_keras.losses.
        feature_loss: What compares feature maps.
        head: What sits on a supervised layer while the student is trained.
        weighting: How the shallow layers share those two coefficients: softmax, proportional,
            inverse, uniform, or relative to what each layer's loss was on average so far.
        weighting_temperature: Of the softmax weighting: a smaller one gives more to the largest
            loss.
        dtype_policy: Precision of the student's training; variables and losses stay float32, and
            mixed_float16 scales the loss. A teacher is trained in float32.
        epochs: Epochs of the student.
        batch_size: Images in a step, on all devices together.
        devices: How many train together, each a share of every batch; all is all that there are.
            TensorFlow and JAX alone.
        steps_per_execution: Steps that Keras runs together, between which nothing returns to Python
            on TensorFlow, and no loss on JAX. It has to divide the steps of an epoch; PyTorch
            knows 1 alone.
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
            load instead of training the teacher; or pretrained: and the name of a model that this
            package holds, such as pretrained:resnet20_cifar100.
        teacher_epochs: Epochs of a teacher that has to be trained. Default: as many as the student.
        teacher_learning_rate: Of such a teacher. Default: the student's.
        teacher_seed: Seed of such a teacher.
        teacher_dir: Where trained teachers are kept.
        fold_teacher: Fold the teacher's batch normalisations into its convolutions before it
            teaches: the same outputs but for rounding, and faster.
        teacher_dtype: Precision in which it then teaches; its outputs are float32. bfloat16 and
            float16 pay on a processor or an accelerator that computes in them.
        cached_views: Show the student that many fixed augmented views of every image, and compute
            the teacher's outputs for them once, for all runs and trials; 0 augments anew in every
            epoch and runs the teacher in every step.
        min_teacher_accuracy: A teacher with a lower test accuracy (0 to 1) is refused.
        run_dir: Where the run is written. Default: runs/ and the pair's name, else
            TEACHER_STUDENT.
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
    stream: bool | None = None
    stream_workers: int | None = None
    augmentation: Literal["auto", "crop_flip", "crop", "resized_crop_flip", "none"] = "auto"
    augment_on: Literal["host", "device"] = "host"
    student_layers: list[str] = dataclasses.field(default_factory=lambda: ["auto"])
    teacher_layer: list[str] | str | None = "auto"
    temperature: float = 4.0
    label_weight: float = 1.0
    prediction_weight: float = 1.0
    deep_prediction_weight: float = 1.0
    deep_feature_weight: float = 10.0
    deep_supervision: float = 0.5
    prediction_loss: PredictionLoss = "kl_divergence"
    feature_loss: FeatureLoss = "feature_mean_squared_error"
    head: Head = "separable"
    weighting: Weighting = "uniform"
    weighting_temperature: float = 1.0
    dtype_policy: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    epochs: int = 240
    batch_size: int = 64
    devices: int | str = 1
    steps_per_execution: int = 1
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
    cached_views: int = 0
    min_teacher_accuracy: float = 0.0
    run_dir: str | None = None
    include_preprocessing: bool = False
    export: list[Literal["onnx", "saved_model", "litert"]] = dataclasses.field(default_factory=list)
    resume: bool = False
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        for field in ("teacher", "student"):
            catalog.check_name(field, getattr(self, field))
        self._check_pretrained()
        self.check_whole(
            1, "epochs", "batch_size", "train_examples", "teacher_epochs", "checkpoint_steps",
            "steps_per_execution",
        )  # fmt: skip
        self.check_whole(1, "image_size", most=_MOST_PIXELS)
        if self.devices != ALL:
            if isinstance(self.devices, str):
                raise wrong("devices", self.devices, f"a whole number of devices, or {ALL}")
            self.check_whole(1, "devices")
        self.check_whole(0, "teacher_seed", most=MOST_SEED)
        self.check_whole(0, "cached_views")
        if self.cached_views:
            self._check_cached_views()
        self.check_whole(0, "stream_workers", most=_MOST_WORKERS)
        for field in PATHS:
            if (path := getattr(self, field)) is not None:
                checks.path(field, path)
        # It names the run's folder.
        if self.pair is not None:
            checks.path("pair", self.pair)
            if "/" in self.pair or self.pair.startswith("."):
                raise wrong("pair", self.pair, "a name, of no other folder")
        for field in (
            "label_weight", "prediction_weight", "deep_prediction_weight", "deep_feature_weight",
            "weight_decay",
        ):  # fmt: skip
            checks.real(field, getattr(self, field), least=0)
        checks.temperature("temperature", self.temperature)
        for field in ("weighting_temperature", "decay_factor", "learning_rate"):
            checks.real(field, getattr(self, field), above=0)
        if self.teacher_learning_rate is not None:
            checks.real("teacher_learning_rate", self.teacher_learning_rate, above=0)
        for field in ("momentum", "validation_fraction"):
            checks.real(field, getattr(self, field), least=0, below=1)
        checks.real("deep_supervision", self.deep_supervision, above=0, most=1)
        checks.real("min_teacher_accuracy", self.min_teacher_accuracy, least=0, most=1)
        if self.nesterov and not self.momentum:
            raise InputError("nesterov: True, but momentum is 0. Nesterov's needs some momentum.")
        if not all(0 < share < 1 for share in self.decay_at):
            raise wrong(
                "decay_at", self.decay_at, "shares of the training between 0 and 1, such as 0.75"
            )
        if len(self.seeds) > _MOST_SEEDS:
            raise InputError(f"seeds: {len(self.seeds):,} values, and {_MOST_SEEDS} are the most.")
        if (
            not self.seeds
            or len(set(self.seeds)) != len(self.seeds)
            or any(isinstance(seed, bool) or not 0 <= seed <= MOST_SEED for seed in self.seeds)
        ):
            raise wrong(
                "seeds", self.seeds, f"different whole numbers from 0 to {MOST_SEED}, one or more"
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
        if (
            self.method == "dskd"
            and isinstance(self.teacher_layer, list)
            and self.student_layers != ["auto"]
            and len(self.teacher_layer) != len(self.student_layers)
        ):
            raise InputError(
                f"teacher_layer: {len(self.teacher_layer)} layers, but there are "
                f"{len(self.student_layers)} student_layers. Name one for all, or one for each."
            )
        if self.method == "dskd" and not self.student_layers:
            raise InputError(
                "student_layers: empty, but method is dskd. Name the layers to supervise, or "
                "choose method kd."
            )

    def _check_cached_views(self) -> None:
        for field, needed, why in (
            ("devices", 1, "each step reads the outputs for one device"),
            ("augment_on", "host", "the views are made once, on the host"),
        ):
            if (value := getattr(self, field)) != needed:
                raise InputError(
                    f"{field}: {value}, but cached_views is {self.cached_views}: {why}. Set it to "
                    f"{needed}, or cached_views to 0."
                )
        if self.method == "ce":
            raise InputError(
                f"cached_views: {self.cached_views}, but method ce has no teacher. Set it to 0."
            )

    def check_views(self) -> None:
        """Raises `InputError` where a run (not the trials of a search) would not show all views."""
        if self.cached_views > self.epochs:
            raise InputError(
                f"cached_views: {self.cached_views}, but epochs is {self.epochs}, and each epoch "
                "shows one view. Take no more views than epochs."
            )

    def _check_pretrained(self) -> None:
        if (card := self._card()) is None:
            return
        if card.architecture != catalog.check_name("teacher", self.teacher):
            raise InputError(
                f"teacher_weights: {self.teacher_weights} is a {card.architecture}, but teacher is "
                f"{self.teacher}. Choose teacher {card.architecture}, or other weights."
            )

    def _card(self) -> cards.Card | None:
        if self.teacher_weights is None or not str(self.teacher_weights).startswith(cards.PREFIX):
            return None
        name = self.teacher_weights.removeprefix(cards.PREFIX)
        return cards.pretrained_card(name, field="teacher_weights")

    def teacher_file(self) -> Path | None:
        """Returns the file of the teacher's weights, None where it has to be trained."""
        if (card := self._card()) is not None:
            return card.weights(field="teacher_weights")
        return None if self.teacher_weights is None else Path(self.teacher_weights)

    def unused(self) -> list[str]:
        """Returns the fields that are not at their default although the method passes over them."""
        of_method = {"dskd": (), "kd": _OF_LAYERS, "ce": (*_OF_LAYERS, *_OF_TEACHER)}
        names = [*of_method[self.method]]
        if self.method == "dskd" and self.weighting != "softmax":
            names.append("weighting_temperature")
        default = type(self)(self.teacher, self.student)
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    def check_whole(self, least: int, *fields: str, most: int = _MOST) -> None:
        """Raises `InputError` unless the fields are null or whole numbers in these bounds."""
        for field in fields:
            if getattr(self, field) is not None:
                checks.whole(field, getattr(self, field), least, most)

    def check_files(self) -> None:
        """Raises `InputError` where a file that the configuration names is missing."""
        kinds.check_stream(self.dataset, self.stream)
        # A finished run needs no teacher any more.
        if not all((self.seed_folder(seed) / "metrics.json").exists() for seed in self.seeds):
            self.check_teacher_file()

    def check_teacher_file(self) -> None:
        """Raises `InputError` where the teacher's weights are named and missing."""
        file = self.teacher_file()
        if file is not None and not file.is_file():
            raise InputError(f"teacher_weights: there is no file '{self.teacher_weights}'.")

    def folder(self) -> Path:
        """Returns the folder of all methods and seeds."""
        name = self.pair or f"{self.teacher}_{self.student}"
        return Path("runs", name) if self.run_dir is None else Path(self.run_dir)

    def seed_folder(self, seed: int) -> Path:
        """Returns the folder of one seed's run."""
        return self.folder() / self.method / f"seed-{seed}"

    def to_yaml(self) -> str:
        """Returns the YAML that `--config` reads back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
