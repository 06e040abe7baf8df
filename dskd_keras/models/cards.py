"""The cards of the trained models that this package holds, known without Keras."""

import dataclasses
import hashlib
import json
from pathlib import Path

from dskd_keras.errors import InputError, unknown_name

# Before a card's name, where the path of a file may stand too.
PREFIX = "pretrained:"
# A card NAME.json and its weights NAME.weights.h5 for each.
FOLDER = Path(__file__).parent / "weights"


@dataclasses.dataclass(frozen=True)
class Card:
    """What there is to know of a trained model.

    Attributes:
        name: For `pretrained`.
        architecture: Name of the zoo's model.
        dataset: Name of the images that it was trained on.
        num_classes: Number of classes, in the data set's own order.
        image_shape: `(height, width, channels)` of an image.
        mean: Of each channel, of pixels from 0 to 1; the model takes
            `(pixels / 255 - mean) / std`.
        std: Of each channel likewise.
        test_accuracy: Share of the test images that the kept weights classify rightly.
        protocol: How it was trained.
        command: What trains it again.
        sha256: Checksum of the file of its weights, which are float16.
    """

    name: str
    architecture: str
    dataset: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_accuracy: float
    protocol: str
    command: str
    sha256: str

    def weights(self, *, field: str = "name") -> Path:
        """Returns the file of the weights.

        Args:
            field: What an error calls the card. Defaults to `"name"`.

        Raises:
            InputError: It is missing or damaged.
        """
        path = FOLDER / f"{self.name}.weights.h5"
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise InputError(
                f"{field}: '{path}' is not the file that was packed. Install the package again."
            )
        return path


def pretrained_names() -> list[str]:
    """Returns the names that `pretrained` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def pretrained_card(name: str, *, field: str = "name") -> Card:
    """Returns the card of a trained model: its accuracy, its images, how it was trained.

    Args:
        name: One of `pretrained_names()`.
        field: What an error about `name` calls it. Defaults to `"name"`.

    Raises:
        InputError: The name is unknown.
    """
    if name not in pretrained_names():
        raise unknown_name(field, name, pretrained_names())
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    return Card(name=name, **{**content, **lists})
