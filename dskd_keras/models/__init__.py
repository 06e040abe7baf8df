"""The model zoo: the teachers and students of the distillation literature, for small images.

Every model is functional, gives logits, names the output of each stage `stage1`, `stage2`, … and
consists of Keras's own layers alone, so that a saved one loads without this package.
"""

from typing import TYPE_CHECKING

from dskd_keras._lazy import attach

if TYPE_CHECKING:
    from dskd_keras.models.cards import pretrained_card, pretrained_names
    from dskd_keras.models.catalog import names
    from dskd_keras.models.torch_weights import load_torch_weights
    from dskd_keras.models.trained import pretrained
    from dskd_keras.models.zoo import create

__all__ = [
    "create", "load_torch_weights", "names", "pretrained", "pretrained_card", "pretrained_names",
]  # fmt: skip

__getattr__, __dir__ = attach(
    __name__,
    {
        "create": "zoo", "load_torch_weights": "torch_weights", "names": "catalog",
        "pretrained": "trained", "pretrained_card": "cards", "pretrained_names": "cards",
    },
)  # fmt: skip
