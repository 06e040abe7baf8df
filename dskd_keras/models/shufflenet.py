"""ShuffleNet V1 and V2 for small images.

The networks of Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for
Mobile Devices" (CVPR 2018, arXiv 1707.01083), with three groups, and Ma et al., "ShuffleNet V2:
Practical Guidelines for Efficient CNN Architecture Design" (ECCV 2018, arXiv 1807.11164), in the
form of the public RepDistiller models: the stem is a 1×1 convolution at full resolution, without
pooling. At 100 classes the number of trainable parameters is exactly the reference's.
"""

import re
from dataclasses import dataclass

import keras

from dskd_keras.models import layers


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one ShuffleNet from another.

    Attributes:
        stages: Channels after each stage.
        blocks: Blocks in each stage; the first halves the resolution.
        groups: Groups of a version 1's 1×1 convolutions; `None` is version 2.
        head: Channels of the 1×1 convolution before the pooling; `None` for none.
    """

    stages: tuple[int, ...]
    blocks: tuple[int, ...] = (4, 8, 4)
    groups: int | None = None
    head: int | None = None


ARCHITECTURES = {
    "ShuffleV1": Architecture(stages=(240, 480, 960), groups=3),
    "ShuffleV2": Architecture(stages=(116, 232, 464), head=1024),
}
_STEM_CHANNELS = 24

# Three halvings leave a feature map of 2×2, the smallest on which the position still says
# something.
MINIMUM_SIZE = 16


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """Builds one ShuffleNet with freshly initialised weights.

    Args:
        name: A key of `ARCHITECTURES`; it becomes the name of the model.
        num_classes: Number of classes.
        input_shape: Shape of one image, in the order of `keras.config.image_data_format()`.

    Returns:
        A functional model from images `[B, *input_shape]` to logits `[B, num_classes]`. The layers
        `stage1`, `stage2` and `stage3` give the feature maps after each stage, at 1/2, 1/4 and 1/8
        of the resolution (rounded up); `pool` gives the features before `logits`.
    """
    network = ARCHITECTURES[name]
    images = keras.Input(input_shape, name="images")
    x = _convolve(images, _STEM_CHANNELS, "stem", "")
    channels = _STEM_CHANNELS
    for stage, (outputs, blocks) in enumerate(
        zip(network.stages, network.blocks, strict=True), start=1
    ):
        for block in range(1, blocks + 1):
            prefix = f"stage{stage}_block{block}"
            name_of_last = f"stage{stage}" if block == blocks else None
            if network.groups is None:
                unit = _unit_v2 if channels == outputs else _downsampling_unit_v2
                x = unit(x, outputs, prefix, name_of_last)
            else:
                x = _unit_v1(x, channels, outputs, network.groups, prefix, name_of_last)
            channels = outputs
    if network.head is not None:
        x = _convolve(x, network.head, "head", "")
    x = layers.global_average_pool(x, name="pool")
    return keras.Model(images, layers.classifier(x, num_classes, name="logits"), name=name)


def _unit_v1(x, channels, outputs, groups, prefix, name):
    """Figure 2 b and c of the first paper, with a ReLU after the depthwise convolution too."""
    downsamples = channels != outputs
    # The branch that is joined to the pooled shortcut gives only the channels that this lacks.
    own = outputs - channels if downsamples else outputs
    # The 24 channels of the stem are too few to be grouped.
    first_groups = 1 if channels == _STEM_CHANNELS else groups
    shortcut = x
    x = _convolve(x, own // 4, prefix, "1", groups=first_groups)
    if first_groups > 1:
        x = layers.channel_shuffle(x, first_groups, name=f"{prefix}_shuffle")
    x = _depthwise(x, prefix, "2", strides=2 if downsamples else 1)
    x = layers.relu(x, name=f"{prefix}_relu2")
    x = _convolve(x, own, prefix, "3", groups=groups, activate=False)
    if downsamples:
        shortcut = layers.average_pool(shortcut, name=f"{prefix}_shortcut_pool")
        x = layers.concatenate([x, shortcut], name=f"{prefix}_concat")
    else:
        x = keras.layers.Add(name=f"{prefix}_add")([x, shortcut])
    return layers.relu(x, name=name or f"{prefix}_relu3")


def _unit_v2(x, outputs, prefix, name):
    """Figure 3 c of the second paper: half of the channels pass untouched."""
    half = outputs // 2
    untouched = layers.channel_slice(x, 0, half, name=f"{prefix}_first")
    x = layers.channel_slice(x, half, outputs, name=f"{prefix}_second")
    x = _convolve(x, half, prefix, "1")
    x = _depthwise(x, prefix, "2")
    x = _convolve(x, half, prefix, "3")
    x = layers.concatenate([untouched, x], name=f"{prefix}_concat")
    return layers.channel_shuffle(x, 2, name=name or f"{prefix}_shuffle")


def _downsampling_unit_v2(x, outputs, prefix, name):
    """Figure 3 d of the second paper."""
    half = outputs // 2
    left = _depthwise(x, prefix, "1", strides=2)
    left = _convolve(left, half, prefix, "2")
    x = _convolve(x, half, prefix, "3")
    x = _depthwise(x, prefix, "4", strides=2)
    x = _convolve(x, half, prefix, "5")
    x = layers.concatenate([left, x], name=f"{prefix}_concat")
    return layers.channel_shuffle(x, 2, name=name or f"{prefix}_shuffle")


def _convolve(x, filters, prefix, index, groups=1, activate=True):
    x = layers.convolution(
        x, filters, 1, name=f"{prefix}_conv{index}", groups=groups, initialization="torch"
    )
    x = layers.batch_norm(x, name=f"{prefix}_bn{index}")
    return layers.relu(x, name=f"{prefix}_relu{index}") if activate else x


def _depthwise(x, prefix, index, strides=1):
    x = layers.depthwise_convolution(
        x, 3, name=f"{prefix}_conv{index}", strides=strides, initialization="torch"
    )
    return layers.batch_norm(x, name=f"{prefix}_bn{index}")


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
