"""MobileNetV2 for small images.

The network of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018,
arXiv 1801.04381, table 2), in two published forms: `MobileNetV2`, with half the channels, is the
student of the CIFAR-100 tables (RepDistiller's `mobile_half`), and `MobileNetV2_tinyimagenet`, with
all of them, that of mdistiller's Tiny ImageNet table. The number of trainable parameters is exactly
the reference's.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import keras

from dskd_keras.models import layers


class _Row(NamedTuple):
    """Blocks that share their number of channels: a row of the paper's table."""

    stage: int
    blocks: int
    channels: int
    expansion: int = 6


# Stages as the reference groups them: the maps that one of its methods can use as features.
_ROWS = (
    _Row(stage=1, blocks=1, channels=16, expansion=1),
    _Row(stage=1, blocks=2, channels=24),
    _Row(stage=2, blocks=3, channels=32),
    _Row(stage=3, blocks=4, channels=64),
    _Row(stage=3, blocks=3, channels=96),
    _Row(stage=4, blocks=3, channels=160),
    _Row(stage=4, blocks=1, channels=320),
)
_STEM_CHANNELS = 32
_LAST_CHANNELS = 1280


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one form of the network from the other.

    Attributes:
        width: Factor of the channels, except the last 1,280.
        stem: Kernel size and stride of the stem.
        strides: Stride of the first block of each row.
        use_bias: Whether the convolutions have biases.
        maximum: Where the ReLUs are cut; `None` for never.
        initialization: How the weights start.
    """

    width: float
    stem: tuple[int, int]
    strides: tuple[int, ...]
    use_bias: bool
    maximum: float | None
    initialization: layers.Initialization


ARCHITECTURES = {
    "MobileNetV2": Architecture(
        width=0.5,
        stem=(3, 2),
        strides=(1, 1, 2, 2, 1, 2, 1),
        use_bias=False,
        maximum=None,
        initialization="he",
    ),
    "MobileNetV2_tinyimagenet": Architecture(
        width=1.0,
        stem=(1, 1),
        strides=(1, 2, 2, 2, 1, 1, 1),
        use_bias=True,
        maximum=6.0,
        initialization="torch",
    ),
}

# Four halvings of the half-width network leave a feature map of 2×2.
MINIMUM_SIZE = 32


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """Builds one MobileNetV2 with freshly initialised weights.

    Args:
        name: A key of `ARCHITECTURES`; it becomes the name of the model.
        num_classes: Number of classes.
        input_shape: Shape of one image, in the order of `keras.config.image_data_format()`.

    Returns:
        A functional model from images `[B, *input_shape]` to logits `[B, num_classes]`. The layers
        `stage1` to `stage4` give linear feature maps: of `MobileNetV2` at 1/2, 1/4, 1/8 and 1/16 of
        the resolution, of `MobileNetV2_tinyimagenet` at 1/2, 1/4, 1/8 and 1/8 of one that its stem
        has padded by 2. `head_relu` gives the last feature map, `pool` the features before
        `logits`.
    """
    network = ARCHITECTURES[name]
    images = keras.Input(input_shape, name="images")
    kernel_size, strides = network.stem
    x = images
    if kernel_size == 1:
        # A border of zeros around the image becomes one of the bias: the reference's own choice.
        x = layers.zero_padding(x, 1, name="stem_pad")
    channels = int(_STEM_CHANNELS * network.width)
    x = _convolve(network, x, channels, kernel_size, "stem", strides=strides)
    block = 0
    for index, (row, first_strides) in enumerate(zip(_ROWS, network.strides, strict=True)):
        ends_stage = index + 1 == len(_ROWS) or _ROWS[index + 1].stage > row.stage
        block = block if index and _ROWS[index - 1].stage == row.stage else 0
        for repeat in range(row.blocks):
            block += 1
            outputs = int(row.channels * network.width)
            prefix = f"stage{row.stage}_block{block}"
            last = ends_stage and repeat + 1 == row.blocks
            x = _inverted_residual(
                network,
                x,
                channels * row.expansion,
                outputs,
                strides=first_strides if repeat == 0 else 1,
                residual=channels == outputs and (repeat > 0 or first_strides == 1),
                prefix=prefix,
                name=f"stage{row.stage}" if last else None,
            )
            channels = outputs
    x = _convolve(network, x, _LAST_CHANNELS, 1, "head")
    x = layers.global_average_pool(x, name="pool")
    initializers = {}
    if network.initialization == "he":
        initializers["kernel_initializer"] = keras.initializers.RandomNormal(stddev=0.01)
        initializers["bias_initializer"] = "zeros"
    logits = layers.classifier(x, num_classes, name="logits", **initializers)
    return keras.Model(images, logits, name=name)


def _convolve(network, x, filters, kernel_size, prefix, strides=1):
    x = layers.convolution(
        x,
        filters,
        kernel_size,
        name=f"{prefix}_conv",
        strides=strides,
        use_bias=network.use_bias,
        initialization=network.initialization,
    )
    x = layers.batch_norm(x, name=f"{prefix}_bn")
    return layers.relu(x, name=f"{prefix}_relu", maximum=network.maximum)


def _inverted_residual(network, x, expanded, outputs, *, strides, residual, prefix, name):
    options = {"use_bias": network.use_bias, "initialization": network.initialization}
    shortcut = x
    x = _convolve(network, x, expanded, 1, f"{prefix}_expand")
    x = layers.depthwise_convolution(
        x, 3, name=f"{prefix}_depthwise_conv", strides=strides, **options
    )
    x = layers.batch_norm(x, name=f"{prefix}_depthwise_bn")
    x = layers.relu(x, name=f"{prefix}_depthwise_relu", maximum=network.maximum)
    x = layers.convolution(x, outputs, 1, name=f"{prefix}_project_conv", **options)
    x = layers.batch_norm(x, name=f"{prefix}_project_bn")
    if residual:
        return keras.layers.Add(name=name or f"{prefix}_add")([x, shortcut])
    return keras.layers.Identity(name=name)(x) if name else x


def torch_module(name: str, layer: str) -> str:
    """Returns what a layer with weights is called in a published PyTorch checkpoint."""
    half = name == "MobileNetV2"
    if match := re.fullmatch(r"stage(\d)_block(\d+)_(\w+)_(conv|bn)", layer):
        row, repeat = _row_of(int(match[1]), int(match[2]))
        # In a block's sequence a ReLU follows each of the first two normalisations.
        position = 3 * ("expand", "depthwise", "project").index(match[3]) + (match[4] == "bn")
        if half:
            return f"blocks.{row}.{repeat}.conv.{position}"
        repeats = f".{repeat}" if _ROWS[row].blocks > 1 else ""
        return f"stage{row + 1}{repeats}.residual.{position}"
    stem, head, logits = ("conv1", "conv2", "classifier.0") if half else ("pre", "conv1", "conv2")
    return {
        "stem_conv": f"{stem}.0",
        "stem_bn": f"{stem}.1",
        "head_conv": f"{head}.0",
        "head_bn": f"{head}.1",
        "logits": logits,
    }[layer]


def _row_of(stage, block):
    """Returns the row of a stage's block, and which of the row's blocks it is, both from 0."""
    block -= 1
    for index, row in enumerate(_ROWS):
        if row.stage == stage:
            if block < row.blocks:
                return index, block
            block -= row.blocks
    raise KeyError(f"stage{stage}_block{block}")
