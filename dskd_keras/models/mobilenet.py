"""MobileNetV2 for small images.

The network of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018,
arXiv 1801.04381, table 2), in two published forms: `MobileNetV2`, with half the channels, is the
student of the CIFAR-100 tables (RepDistiller's `mobile_half`), and `MobileNetV2_tinyimagenet`, with
all of them, that of mdistiller's Tiny ImageNet table. The number of trainable parameters is exactly
the reference's.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import keras

from dskd_keras.models import layers

# The paper's table: the stage, the number of blocks and their channels. The stages are the
# reference's: the maps that one of its methods can use as features.
_ROWS = ((1, 1, 16), (1, 2, 24), (2, 3, 32), (3, 4, 64), (3, 3, 96), (4, 3, 160), (4, 1, 320))


def _number_blocks() -> Iterator[tuple[str, tuple[int, int]]]:
    counts: Counter[int] = Counter()
    for row, (stage, blocks, _) in enumerate(_ROWS):
        for repeat in range(blocks):
            counts[stage] += 1
            yield f"stage{stage}_block{counts[stage]}", (row, repeat)


# The row of each block, and which of the row's blocks it is, both from 0.
_BLOCKS = dict(_number_blocks())
_EXPANSION = 6
_STEM_CHANNELS = 32
_LAST_CHANNELS = 1280


class Architecture(NamedTuple):
    """What distinguishes one form of the network from the other."""

    width: float  # factor of the channels, except the last 1,280
    stem: tuple[int, int]  # kernel size and stride
    strides: tuple[int, ...]  # of the first block of each row
    use_bias: bool = False
    maximum: float | None = None  # where the ReLUs are cut
    initialization: layers.Initialization = "he"


ARCHITECTURES = {
    "MobileNetV2": Architecture(width=0.5, stem=(3, 2), strides=(1, 1, 2, 2, 1, 2, 1)),
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
    """Builds one MobileNetV2, freshly initialised, of arguments that `zoo.create` has checked.

    The layers `stage1` to `stage4` give linear feature maps: of `MobileNetV2` at 1/2, 1/4, 1/8 and
    1/16 of the resolution, of `MobileNetV2_tinyimagenet` at 1/2, 1/4, 1/8 and 1/8 of one that its
    stem has padded by 2. `head_relu` gives the last feature map, `pool` the features before
    `logits`.
    """
    network = ARCHITECTURES[name]
    images = x = keras.Input(input_shape, name="images")
    kernel_size, strides = network.stem
    convolve = functools.partial(
        layers.normalized_convolution,
        maximum=network.maximum,
        use_bias=network.use_bias,
        initialization=network.initialization,
    )
    if kernel_size == 1:
        # A border of zeros around the image becomes one of the bias: the reference's own choice.
        x = keras.layers.ZeroPadding2D(1, name="stem_pad")(x)
    channels = int(_STEM_CHANNELS * network.width)
    x = convolve(x, channels, kernel_size, "stem", strides=strides)
    last_of_stage = {prefix.split("_")[0]: prefix for prefix in _BLOCKS}
    for prefix, (row, repeat) in _BLOCKS.items():
        stage = prefix.split("_")[0]
        last = last_of_stage[stage] == prefix
        strides = 1 if repeat else network.strides[row]
        outputs = int(_ROWS[row][2] * network.width)
        shortcut = x
        x = convolve(x, channels * (_EXPANSION if row else 1), 1, f"{prefix}_expand")
        x = convolve(x, None, 3, f"{prefix}_depthwise", strides=strides)
        x = convolve(x, outputs, 1, f"{prefix}_project", activate=False)
        if channels == outputs and strides == 1:
            x = keras.layers.Add(name=stage if last else f"{prefix}_add")([x, shortcut])
        elif last:
            x = keras.layers.Identity(name=stage)(x)
        channels = outputs
    x = convolve(x, _LAST_CHANNELS, 1, "head")
    he = network.initialization == "he"
    return layers.classifier(images, x, num_classes, name, std=0.01 if he else None, zero_bias=he)


def torch_module(name: str, layer: str) -> str:
    """Returns what a layer with weights is called in a published PyTorch checkpoint."""
    half = name == "MobileNetV2"
    if match := re.fullmatch(r"(stage\d_block\d+)_(\w+)_(conv|bn)", layer):
        row, repeat = _BLOCKS[match[1]]
        # In a block's sequence a ReLU follows each of the first two normalisations.
        position = 3 * ("expand", "depthwise", "project").index(match[2]) + (match[3] == "bn")
        if half:
            return f"blocks.{row}.{repeat}.conv.{position}"
        repeats = f".{repeat}" if _ROWS[row][1] > 1 else ""
        return f"stage{row + 1}{repeats}.residual.{position}"
    stem, head, logits = ("conv1", "conv2", "classifier.0") if half else ("pre", "conv1", "conv2")
    return {
        "stem_conv": f"{stem}.0",
        "stem_bn": f"{stem}.1",
        "head_conv": f"{head}.0",
        "head_bn": f"{head}.1",
        "logits": logits,
    }[layer]
