"""What the parts of a training run share."""

import dataclasses
from typing import Any

from rich.console import Console

from dskd_keras.data.dataset import ImageDataset
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.devices import Devices


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration with what it is run on.

    Attributes:
        config: The configuration.
        dataset: The images that it names.
        console: For messages and tables.
        command: The command line that asked for it, None where there is none.
        devices: What trains.
    """

    config: ExperimentConfig
    dataset: ImageDataset
    console: Console
    command: str | None = None
    devices: Devices = dataclasses.field(default_factory=Devices)

    def replace(self, **fields: Any) -> "Run":
        """Returns the same run with other fields of its configuration."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **fields))

    def say(self, message: str, style: str | None = None) -> None:
        """Prints a message."""
        self.console.print(message, style=style)
