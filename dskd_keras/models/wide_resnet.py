"""Wide residual networks for small images.

The networks of Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016, arXiv 1605.07146), in
the form of the public RepDistiller models, without dropout: three stages of pre-activated blocks at
full, half and quarter resolution. At 100 classes the number of trainable parameters is exactly the
reference's.
"""

import re
from dataclasses import dataclass

import keras

from dskd_keras.models import layers


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one wide residual network from another.

    Attributes:
        blocks: Blocks, of two convolutions each, in every one of the three stages.
        width: Factor of the channels 16, 32 and 64 of the stages.
    """

    blocks: int
    width: int


# A depth of 6n + 4 counts the stem, two convolutions in each of n blocks in three stages, and the
# three 1×1 convolutions of the shortcuts.
ARCHITECTURES = {
    "wrn_16_1": Architecture(blocks=2, width=1),
    "wrn_16_2": Architecture(blocks=2, width=2),
    "wrn_40_1": Architecture(blocks=6, width=1),
    "wrn_40_2": Architecture(blocks=6, width=2),
}

# Two halvings leave a feature map of 2×2, the smallest on which the position still says something.
MINIMUM_SIZE = 8


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """Builds one wide residual network with freshly initialised weights.

    Args:
        name: A key of `ARCHITECTURES`; it becomes the name of the model.
        num_classes: Number of classes.
        input_shape: Shape of one image, in the order of `keras.config.image_data_format()`.

    Returns:
        A functional model from images `[B, *input_shape]` to logits `[B, num_classes]`. The layers
        `stage1`, `stage2` and `stage3` give the sums that leave each stage, at 1, 1/2 and 1/4 of
        the resolution (rounded up), before the next normalisation and ReLU; `final_relu` gives the
        last feature map, `pool` the features before `logits`.
    """
    architecture = ARCHITECTURES[name]
    images = x = keras.Input(input_shape, name="images")
    channels = 16
    x = layers.convolution(x, channels, 3, name="stem_conv")
    for stage, base in enumerate((16, 32, 64), start=1):
        filters = base * architecture.width
        for block in range(1, architecture.blocks + 1):
            last = block == architecture.blocks
            x = _block(
                x,
                filters,
                strides=2 if stage > 1 and block == 1 else 1,
                project=channels != filters,
                prefix=f"stage{stage}_block{block}",
                name=f"stage{stage}" if last else f"stage{stage}_block{block}_add",
            )
            channels = filters
    x = layers.batch_norm(x, name="final_bn")
    x = layers.relu(x, name="final_relu")
    x = layers.global_average_pool(x, name="pool")
    logits = layers.classifier(x, num_classes, name="logits", bias_initializer="zeros")
    return keras.Model(images, logits, name=name)


def _block(x, filters, strides, project, prefix, name):
    shortcut = x
    x = layers.batch_norm(x, name=f"{prefix}_bn1")
    x = layers.relu(x, name=f"{prefix}_relu1")
    if project:
        # Where the channels change, both branches start from the activated map.
        shortcut = layers.convolution(
            x, filters, 1, strides=strides, name=f"{prefix}_shortcut_conv"
        )
    x = layers.convolution(x, filters, 3, strides=strides, name=f"{prefix}_conv1")
    x = layers.batch_norm(x, name=f"{prefix}_bn2")
    x = layers.relu(x, name=f"{prefix}_relu2")
    x = layers.convolution(x, filters, 3, name=f"{prefix}_conv2")
    return keras.layers.Add(name=name)([x, shortcut])


def torch_module(name: str, layer: str) -> str:
    """Returns what a layer with weights is called in a published PyTorch checkpoint."""
    if match := re.fullmatch(r"stage(\d)_block(\d+)_(\w+)", layer):
        stage, block, role = match.groups()
        role = {"shortcut_conv": "convShortcut"}.get(role, role)
        return f"block{stage}.layer.{int(block) - 1}.{role}"
    return {"stem_conv": "conv1", "final_bn": "bn1", "logits": "fc"}[layer]
