"""Several teachers in the place of one."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from dskd_keras import checks, maps
from dskd_keras.errors import InputError, wrong
from dskd_keras.teacher import FrozenTeacher, FunctionTeacher, in_batches

NAMES = ("uniform", "confidence")


def check_weights(weights: Any, count: int) -> str | list[float]:
    """Returns `"confidence"`, or a number for each of `count` teachers; they sum to 1.

    Raises:
        InputError: It is neither a known name nor so many positive numbers.
    """
    if weights == "uniform":
        return [1 / count] * count
    if isinstance(weights, str):
        if weights not in NAMES:
            raise wrong("teacher_weighting", weights, f"{' or '.join(NAMES)}, or numbers")
        return weights
    try:
        numbers = [checks.real("teacher_weighting", weight, least=0) for weight in weights]
    except TypeError:
        numbers = []
    if len(numbers) != count or not sum(numbers):
        raise wrong(
            "teacher_weighting",
            weights,
            f"{', '.join(NAMES)}, or {count} numbers, one a teacher",
        )
    return [number / sum(numbers) for number in numbers]


class Ensemble:
    """Several teachers, as the training step needs them.

    `"logits"` are stacked, `[B, K, C]` of K teachers. The objective compares the student with each.

    The feature maps are brought to the smallest size and joined along their channels, as
    `[B, H, W, ΣD]`. With weights `w_k` the map of each is scaled by `√(w_k · ΣD / D_k)`. So the
    mean squared error of the joint map is the weighted sum of those of the single ones: the
    student's projection absorbs the scale.

    Args:
        teachers: What `FrozenTeacher` or `FunctionTeacher` made of each.
        weights: What `check_weights` returned. By confidence, feature maps count alike.
    """

    def __init__(
        self,
        teachers: Sequence[FrozenTeacher | FunctionTeacher],
        weights: str | list[float],
    ) -> None:
        self._teachers = list(teachers)
        self.weights = weights
        first = teachers[0]
        self.model = [teacher.model for teacher in teachers]
        self.layer = [teacher.layer for teacher in teachers]
        self.output_names = first.output_names
        self.feature_names = first.feature_names
        if any(teacher.output_names != first.output_names for teacher in teachers):
            raise InputError(
                "teacher_layer: several teachers need one name each, or the same names in all."
            )
        self.supports_jit = all(teacher.supports_jit for teacher in teachers)
        self.feature_shapes = {name: self._joint_shape(name) for name in self.feature_names}

    @property
    def variables(self) -> list[keras.Variable]:
        """Those of all teachers, in their order."""
        return [variable for teacher in self._teachers for variable in teacher.variables]

    @property
    def feature_shape(self) -> tuple[Any, ...]:
        """As in `FrozenTeacher`, of the joint map."""
        return self.feature_shapes[self.feature_names[0]] if self.feature_names else ()

    def _joint_shape(self, name: str) -> tuple[Any, ...]:
        shapes = [teacher.feature_shapes[name] for teacher in self._teachers]
        channels = sum(shape[-1] for shape in shapes)
        if len({len(shape) for shape in shapes}) > 1:
            return (channels,)  # maps of different kinds: averages over their positions
        sizes = zip(*(shape[:-1] for shape in shapes), strict=True)
        common: list[Any] = [None if None in size else min(size) for size in sizes]
        return (*common, channels)

    def __call__(self, x: Any, variables: list[Any] | None = None) -> dict[str, Any]:
        """Runs all teachers on a batch, as `FrozenTeacher` does."""
        results, start = [], 0
        for teacher in self._teachers:
            own = None
            if variables is not None:
                own = variables[start : start + len(teacher.variables)]
                start += len(teacher.variables)
            results.append(teacher(x, own))
        outputs = {name: self._joint_map(name, results) for name in self.feature_names}
        if "logits" in self.output_names:
            outputs["logits"] = ops.stack([result["logits"] for result in results], axis=1)
        masks = {k: v for r in reversed(results) for k, v in r.items() if k.endswith("_mask")}
        return outputs | {
            name: mask for name, mask in masks.items()
            if name == "logits_mask" or len(self.feature_shapes[name[:-5]]) > 1
        }  # fmt: skip

    def _joint_map(self, name: str, results: list[dict[str, Any]]) -> Any:
        found = [result[name] for result in results]
        if len({len(x.shape) for x in found}) > 1:
            found = [maps.mean_over_positions(x) for x in found]
        elif len(found[0].shape) > 2:
            smallest = found[0]
            for other in found[1:]:
                smallest, _, _ = maps.aligned(smallest, other)
            found = [maps.resized(x, maps.sizes(smallest))[0] for x in found]
        if not isinstance(self.weights, str):
            channels = sum(x.shape[-1] for x in found)
            found = [
                x * math.sqrt(weight * channels / x.shape[-1])
                for x, weight in zip(found, self.weights, strict=True)
            ]
        return ops.concatenate(found, axis=-1)

    def predict(
        self, x: Any, batch_size: int | None = None, verbose: str | int = 0
    ) -> dict[str, Any]:
        """Returns the outputs for all of `x`, computed in batches, as NumPy arrays."""
        return in_batches(self, x, batch_size)


def confidence(losses: Sequence[Any]) -> list[Any]:
    """Returns the weight of each teacher for each image, from its loss on the labels.

    `w_k = (1 − exp(L_k) / Σ_j exp(L_j)) / (K − 1)`: a teacher that is right counts more. Zhang,
    Chen, Wang: "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP 2022, equation 2.

    Args:
        losses: The K teachers' losses, `[B]` or `[B, *positions]` each.
    """
    if len(losses) == 1:
        return [ops.ones_like(losses[0])]
    shares = ops.softmax(ops.stack(losses), axis=0)
    return [(1.0 - share) / (len(losses) - 1) for share in ops.unstack(shares)]


def of_each(logits: Any) -> list[Any]:
    """Returns the logits `[B, *positions, C]` of each teacher, of stacked ones."""
    return ops.unstack(logits, axis=1)
