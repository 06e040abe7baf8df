"""Residual networks for small images, as the distillation literature uses them.

The networks of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), in the form
of the public RepDistiller models: a 3×3 stem at full resolution without pooling, stages of residual
blocks of which every one after the first halves the resolution, global average pooling and one
linear layer. The shortcut is a 1×1 convolution with batch normalisation wherever the stride or the
number of channels changes. Three stages make the paper's CIFAR networks (section 4.2), four stages
its ImageNet networks (table 1). At 100 classes the number of trainable parameters is exactly the
reference's.
"""

import re
from typing import Any, NamedTuple

import keras

from dskd_keras.models import layers


class Architecture(NamedTuple):
    """What distinguishes one residual network of the family from another."""

    blocks: tuple[int, ...]  # residual blocks in each stage
    stem: int = 16  # channels after it
    stages: tuple[int, ...] = (16, 32, 64)  # channels of each stage's blocks
    # A bottleneck is 1×1, 3×3 and 1×1 convolutions, the last to four times the channels, in place
    # of two 3×3 convolutions.
    bottleneck: bool = False


_IMAGENET: dict[str, Any] = {"stem": 64, "stages": (64, 128, 256, 512)}

# A depth of 6n + 2 counts the stem, two convolutions in each of n blocks in three stages, and the
# linear layer. "x4" multiplies the channels of the stages by four, those of the stem by two.
ARCHITECTURES = {
    "resnet8": Architecture(blocks=(1, 1, 1)),
    "resnet14": Architecture(blocks=(2, 2, 2)),
    "resnet20": Architecture(blocks=(3, 3, 3)),
    "resnet32": Architecture(blocks=(5, 5, 5)),
    "resnet44": Architecture(blocks=(7, 7, 7)),
    "resnet56": Architecture(blocks=(9, 9, 9)),
    "resnet110": Architecture(blocks=(18, 18, 18)),
    "resnet8x4": Architecture(blocks=(1, 1, 1), stem=32, stages=(64, 128, 256)),
    "resnet32x4": Architecture(blocks=(5, 5, 5), stem=32, stages=(64, 128, 256)),
    "resnet18": Architecture(blocks=(2, 2, 2, 2), **_IMAGENET),
    "ResNet50": Architecture(blocks=(3, 4, 6, 3), bottleneck=True, **_IMAGENET),
}

# Two halvings leave a feature map of 2×2, the smallest on which the position still says something;
# in the networks of four stages a third leaves one value.
MINIMUM_SIZE = 8


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """Builds one residual network, freshly initialised, of arguments that `zoo.create` has checked.

    The layers `stage1`, `stage2`, … give the feature maps after the last ReLU of each stage, at 1,
    1/2, 1/4, … of the resolution (rounded up); `pool` gives the features before `logits`.
    """
    network = ARCHITECTURES[name]
    images = keras.Input(input_shape, name="images")
    x = layers.normalized_convolution(images, network.stem, 3, "stem")
    channels = network.stem
    stages = zip(network.stages, network.blocks, strict=True)
    for stage, (filters, blocks) in enumerate(stages, start=1):
        outputs = 4 * filters if network.bottleneck else filters
        for block in range(1, blocks + 1):
            prefix = f"stage{stage}_block{block}"
            strides = 2 if stage > 1 and block == 1 else 1
            # Of each convolution: channels, kernel size and strides.
            convolutions = [(filters, 3, strides), (filters, 3, 1)]
            if network.bottleneck:
                convolutions = [(filters, 1, 1), (filters, 3, strides), (outputs, 1, 1)]
            shortcut = x
            if strides > 1 or channels != outputs:
                shortcut = layers.normalized_convolution(
                    x, outputs, 1, f"{prefix}_shortcut", strides=strides, activate=False
                )
            last = len(convolutions)
            for index, (width, kernel_size, step) in enumerate(convolutions, start=1):
                x = layers.normalized_convolution(
                    x, width, kernel_size, prefix, index, strides=step, activate=index < last
                )
            x = keras.layers.Add(name=f"{prefix}_add")([x, shortcut])
            name_of_last = f"stage{stage}" if block == blocks else f"{prefix}_relu{last}"
            x = keras.layers.ReLU(name=name_of_last)(x)
            channels = outputs
    return layers.classifier(images, x, num_classes, name)


def torch_module(name: str, layer: str) -> str:
    """Returns what a layer with weights is called in a published PyTorch checkpoint.

    The four-stage networks come from another file of the reference, with other names.
    """
    imagenet = len(ARCHITECTURES[name].stages) == 4
    shortcut = "shortcut" if imagenet else "downsample"
    in_block = {"shortcut_conv": f"{shortcut}.0", "shortcut_bn": f"{shortcut}.1"}
    if match := re.fullmatch(r"stage(\d)_block(\d+)_(\w+)", layer):
        stage, block, role = match.groups()
        return f"layer{stage}.{int(block) - 1}.{in_block.get(role, role)}"
    return {"stem_conv": "conv1", "stem_bn": "bn1", "logits": "linear" if imagenet else "fc"}[layer]
