"""ShuffleNet V1 and V2 for small images.

The networks of Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for
Mobile Devices" (CVPR 2018, arXiv 1707.01083), with three groups, and Ma et al., "ShuffleNet V2:
Practical Guidelines for Efficient CNN Architecture Design" (ECCV 2018, arXiv 1807.11164), in the
form of the public RepDistiller models: the stem is a 1×1 convolution at full resolution, without
pooling. At 100 classes the number of trainable parameters is exactly the reference's.
"""

import functools
import re

import keras

from dskd_keras.models import layers

# Blocks in each of the three stages; the first halves the resolution.
_BLOCKS = (4, 8, 4)
# Channels after each stage.
ARCHITECTURES = {"ShuffleV1": (240, 480, 960), "ShuffleV2": (116, 232, 464)}
# Of version 1's 1×1 convolutions.
_GROUPS = 3
# Channels of version 2's 1×1 convolution before the pooling.
_HEAD_CHANNELS = 1024
_STEM_CHANNELS = 24

# Three halvings leave a feature map of 2×2, the smallest on which the position still says
# something.
MINIMUM_SIZE = 16


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """Builds one ShuffleNet, freshly initialised, of arguments that `zoo.create` has checked.

    The layers `stage1`, `stage2` and `stage3` give the feature maps after each stage, at 1/2, 1/4
    and 1/8 of the resolution (rounded up); `pool` gives the features before `logits`.
    """
    images = keras.Input(input_shape, name="images")
    channels, unit = _STEM_CHANNELS, _unit_v1 if name == "ShuffleV1" else _unit_v2
    x = _convolve(images, channels, 1, "stem")
    stages = zip(ARCHITECTURES[name], _BLOCKS, strict=True)
    for stage, (outputs, blocks) in enumerate(stages, start=1):
        for block in range(1, blocks + 1):
            name_of_last = f"stage{stage}" if block == blocks else None
            x = unit(x, channels, outputs, f"stage{stage}_block{block}", name_of_last)
            channels = outputs
    if name == "ShuffleV2":
        x = _convolve(x, _HEAD_CHANNELS, 1, "head")
    return layers.classifier(images, x, num_classes, name)


_convolve = functools.partial(layers.normalized_convolution, initialization="torch")


def _unit_v1(
    x: keras.KerasTensor, channels: int, outputs: int, prefix: str, name: str | None
) -> keras.KerasTensor:
    """Figure 2 b and c of the first paper, with a ReLU after the depthwise convolution too."""
    downsamples = channels != outputs
    # The branch that is joined to the pooled shortcut gives only the channels that this lacks.
    own = outputs - channels if downsamples else outputs
    # The 24 channels of the stem are too few to be grouped.
    first_groups = 1 if channels == _STEM_CHANNELS else _GROUPS
    shortcut = x
    x = _convolve(x, own // 4, 1, prefix, 1, groups=first_groups)
    if first_groups > 1:
        x = layers.channel_shuffle(x, first_groups, name=f"{prefix}_shuffle")
    x = _convolve(x, None, 3, prefix, 2, strides=2 if downsamples else 1)
    x = _convolve(x, own, 1, prefix, 3, groups=_GROUPS, activate=False)
    if downsamples:
        # PyTorch's `AvgPool2d(3, stride=2, padding=1)`: the padded zeros count in the mean.
        shortcut = keras.layers.ZeroPadding2D(1, name=f"{prefix}_shortcut_pool_pad")(shortcut)
        pool = keras.layers.AveragePooling2D(3, strides=2, name=f"{prefix}_shortcut_pool")
        x = _concatenate([x, pool(shortcut)], prefix)
    else:
        x = keras.layers.Add(name=f"{prefix}_add")([x, shortcut])
    return keras.layers.ReLU(name=name or f"{prefix}_relu3")(x)


def _unit_v2(
    x: keras.KerasTensor, channels: int, outputs: int, prefix: str, name: str | None
) -> keras.KerasTensor:
    """Figure 3 c and d of the second paper."""
    half = outputs // 2
    if channels == outputs:
        # Half of the channels pass untouched.
        left = layers.channel_slice(x, 0, half, name=f"{prefix}_first")
        x = layers.channel_slice(x, half, outputs, name=f"{prefix}_second")
        first, strides = 1, 1
    else:
        left = _convolve(x, None, 3, prefix, 1, strides=2, activate=False)
        left = _convolve(left, half, 1, prefix, 2)
        first, strides = 3, 2
    x = _convolve(x, half, 1, prefix, first)
    x = _convolve(x, None, 3, prefix, first + 1, strides=strides, activate=False)
    x = _convolve(x, half, 1, prefix, first + 2)
    x = _concatenate([left, x], prefix)
    return layers.channel_shuffle(x, 2, name=name or f"{prefix}_shuffle")


def _concatenate(maps: list[keras.KerasTensor], prefix: str) -> keras.KerasTensor:
    return keras.layers.Concatenate(axis=layers.channel_axis(), name=f"{prefix}_concat")(maps)


def torch_module(name: str, layer: str) -> str:
    """Returns what a layer with weights is called in a published PyTorch checkpoint."""
    if match := re.fullmatch(r"stage(\d)_block(\d)_(\w+)", layer):
        stage, block, role = match.groups()
        return f"layer{stage}.{int(block) - 1}.{role}"
    return {
        "stem_conv": "conv1",
        "stem_bn": "bn1",
        "head_conv": "conv2",
        "head_bn": "bn2",
        "logits": "linear",
    }[layer]
