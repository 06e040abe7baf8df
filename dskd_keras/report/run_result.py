"""The outcome of a run, and the file that holds it."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dskd_keras.errors import InputError

# What a measured number can be, so that a file that was edited is not believed.
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
_Count = Annotated[int, msgspec.Meta(ge=0)]
# A terminal shows it, and would obey its own characters.
_Name = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The outcome of one training run, as `metrics.json` holds it.

    Attributes:
        method: dskd, kd or ce; "teacher" for the teacher's row of the table.
        model: Name of the model.
        parameters: Number of its trainable parameters.
        test_accuracy: After the last epoch, 0 to 1.
        best_accuracy: Test accuracy after the best epoch, 0 to 1; None where there is none.
        best_epoch: That epoch; the first one is 1.
        best_chosen_on: "validation" or "test": the images by which it is the best.
        images_per_second: Median over the epochs' training, without compilation or evaluation.
        seconds: Duration of the run.
        epochs: Epochs trained.
        seed: The run's seed.
        backend: Keras's backend.
        versions: Versions of the packages that computed it.
        teacher: The `RunResult` of the student's teacher as a dict; None without one.
        teacher_agreement: Share of the test images, 0 to 1, on which student and teacher predict
            the same class; None without a teacher.
        head_accuracies: Test accuracy, 0 to 1, of every auxiliary head by the layer's name.
        latency_ms: Median time to predict one image, in milliseconds.
        weight_bytes: Size of all the model's weights.
        command: The command that made it.
        dataset: Name of the data set.
    """

    method: _Name
    model: _Name
    parameters: _Count
    test_accuracy: _Share
    best_accuracy: _Share | None = None
    best_epoch: _Count | None = None
    best_chosen_on: str | None = None
    images_per_second: _Amount | None = None
    seconds: _Amount | None = None
    epochs: _Count | None = None
    seed: _Count | None = None
    backend: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    teacher: dict[str, Any] | None = None
    teacher_agreement: _Share | None = None
    head_accuracies: dict[str, _Share] = dataclasses.field(default_factory=dict)
    latency_ms: _Amount | None = None
    weight_bytes: _Count | None = None
    command: str | None = None
    dataset: _Name | None = None

    @classmethod
    def from_dict(cls, values: Any) -> "RunResult":
        """Returns the result that a dict holds.

        Keys of other versions are passed over; what an older version lacked takes its default.

        Args:
            values: A dict, such as the field `teacher` holds.

        Raises:
            InputError: A field is missing or of another kind.
        """
        if isinstance(values, dict):
            # Older versions wrote None where there was nothing, also for a dict.
            values = {name: value for name, value in values.items() if value is not None}
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise InputError(f"result: {error}.") from None

    @classmethod
    def read(cls, path: str | Path) -> "RunResult":
        """Reads a `metrics.json`, also one of an older or a newer version.

        Args:
            path: The file.

        Raises:
            InputError: The file is missing or damaged.
        """
        path = Path(path)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"result: can't read '{path}': {error.strerror}.") from None
        except InputError as error:
            raise InputError(f"{error} File: '{path}'.") from None
        except (ValueError, RecursionError):
            raise InputError(f"result: '{path}' is damaged: not JSON.") from None

    def to_json(self) -> str:
        """Returns what `metrics.json` holds."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def by_row(results: Iterable[RunResult]) -> list[list[RunResult]]:
    """Groups the results that share a row of a table: they differ in the seed alone."""
    groups: dict[tuple[Any, ...], list[RunResult]] = {}
    for result in results:
        # The spread of a row is that of seeds, never that of two teachers.
        teacher = result.method == "teacher" and (result.parameters, result.test_accuracy)
        groups.setdefault((result.model, result.method, teacher), []).append(result)
    return list(groups.values())


def known(results: Iterable[RunResult], field: str) -> list[Any]:
    """Returns a field's values, without those that are None."""
    values = (getattr(result, field) for result in results)
    return [value for value in values if value is not None]
