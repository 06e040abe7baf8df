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
from dataclasses import dataclass

import keras

from dskd_keras.models import layers


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one residual network of the family from another.

    Attributes:
        blocks: Residual blocks in each stage.
        stem: Channels after the stem.
        stages: Channels of each stage's blocks, and after the stage unless it has bottlenecks.
        bottleneck: Whether a block is 1×1, 3×3 and 1×1 convolutions, the last to four times the
            channels, rather than two 3×3 convolutions.
    """

    blocks: tuple[int, ...]
    stem: int = 16
    stages: tuple[int, ...] = (16, 32, 64)
    bottleneck: bool = False


_EXPANSION = 4
_IMAGENET_STAGES = (64, 128, 256, 512)

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
    "resnet18": Architecture(blocks=(2, 2, 2, 2), stem=64, stages=_IMAGENET_STAGES),
    "ResNet50": Architecture(
        blocks=(3, 4, 6, 3), stem=64, stages=_IMAGENET_STAGES, bottleneck=True
    ),
}

# Two halvings leave a feature map of 2×2, the smallest on which the position still says something;
# in the networks of four stages a third leaves one value.
MINIMUM_SIZE = 8


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """Builds one residual network with freshly initialised weights.

    Args:
        name: A key of `ARCHITECTURES`; it becomes the name of the model.
        num_classes: Number of classes.
        input_shape: Shape of one image, in the order of `keras.config.image_data_format()`.

    Returns:
        A functional model from images `[B, *input_shape]` to logits `[B, num_classes]`. The layers
        `stage1`, `stage2`, … give the feature maps after the last ReLU of each stage, at 1, 1/2,
        1/4, … of the resolution (rounded up); `pool` gives the features before `logits`.
    """
    architecture = ARCHITECTURES[name]
    images = x = keras.Input(input_shape, name="images")
    x = layers.convolution(x, architecture.stem, 3, name="stem_conv")
    x = layers.batch_norm(x, name="stem_bn")
    x = layers.relu(x, name="stem_relu")
    residual = _bottleneck if architecture.bottleneck else _basic
    channels = architecture.stem
    for stage, filters in enumerate(architecture.stages, start=1):
        outputs = filters * _EXPANSION if architecture.bottleneck else filters
        blocks = architecture.blocks[stage - 1]
        for block in range(1, blocks + 1):
            prefix = f"stage{stage}_block{block}"
            strides = 2 if stage > 1 and block == 1 else 1
            shortcut = x
            if strides > 1 or channels != outputs:
                shortcut = layers.convolution(
                    x, outputs, 1, strides=strides, name=f"{prefix}_shortcut_conv"
                )
                shortcut = layers.batch_norm(shortcut, name=f"{prefix}_shortcut_bn")
            x = residual(x, filters, strides, prefix)
            x = keras.layers.Add(name=f"{prefix}_add")([x, shortcut])
            last = "relu3" if architecture.bottleneck else "relu2"
            x = layers.relu(x, name=f"stage{stage}" if block == blocks else f"{prefix}_{last}")
            channels = outputs
    x = layers.global_average_pool(x, name="pool")
    return keras.Model(images, layers.classifier(x, num_classes, name="logits"), name=name)


def _basic(x, filters, strides, prefix):
    x = layers.convolution(x, filters, 3, strides=strides, name=f"{prefix}_conv1")
    x = layers.batch_norm(x, name=f"{prefix}_bn1")
    x = layers.relu(x, name=f"{prefix}_relu1")
    x = layers.convolution(x, filters, 3, name=f"{prefix}_conv2")
    return layers.batch_norm(x, name=f"{prefix}_bn2")


def _bottleneck(x, filters, strides, prefix):
    x = layers.convolution(x, filters, 1, name=f"{prefix}_conv1")
    x = layers.batch_norm(x, name=f"{prefix}_bn1")
    x = layers.relu(x, name=f"{prefix}_relu1")
    x = layers.convolution(x, filters, 3, strides=strides, name=f"{prefix}_conv2")
    x = layers.batch_norm(x, name=f"{prefix}_bn2")
    x = layers.relu(x, name=f"{prefix}_relu2")
    x = layers.convolution(x, filters * _EXPANSION, 1, name=f"{prefix}_conv3")
    return layers.batch_norm(x, name=f"{prefix}_bn3")


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
