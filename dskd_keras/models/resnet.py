"""Residual networks for small images, as the distillation literature uses them on CIFAR-100.

The family of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016, section 4.2), in
the form of the public RepDistiller models: a 3×3 stem, three stages of basic blocks at full, half
and quarter resolution, global average pooling and one linear layer. Unlike the paper's, the
shortcut is a 1×1 convolution with batch normalisation wherever the stride or the number of channels
changes. At 100 classes the number of trainable parameters is exactly the reference's.
"""

from dataclasses import dataclass

import keras

from dskd_keras.models import layers


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one residual network of the family from another.

    Attributes:
        blocks: Basic blocks, of two convolutions each, in every one of the three stages.
        stem: Channels after the stem.
        stages: Channels after each stage.
    """

    blocks: int
    stem: int = 16
    stages: tuple[int, ...] = (16, 32, 64)


# A depth of 6n + 2 counts the stem, two convolutions in each of n blocks in three stages, and the
# linear layer. "x4" multiplies the channels of the stages by four, those of the stem by two.
ARCHITECTURES = {
    "resnet8": Architecture(blocks=1),
    "resnet14": Architecture(blocks=2),
    "resnet20": Architecture(blocks=3),
    "resnet32": Architecture(blocks=5),
    "resnet44": Architecture(blocks=7),
    "resnet56": Architecture(blocks=9),
    "resnet110": Architecture(blocks=18),
    "resnet8x4": Architecture(blocks=1, stem=32, stages=(64, 128, 256)),
    "resnet32x4": Architecture(blocks=5, stem=32, stages=(64, 128, 256)),
}

# Two halvings leave a feature map of 2×2, the smallest on which the position still says something.
MINIMUM_SIZE = 8


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """Builds one residual network with freshly initialised weights.

    Args:
        name: A key of `ARCHITECTURES`; it becomes the name of the model.
        num_classes: Number of classes.
        input_shape: Shape of one image, in the order of `keras.config.image_data_format()`.

    Returns:
        A functional model from images `[B, *input_shape]` to logits `[B, num_classes]`. The layers
        `stage1`, `stage2` and `stage3` give the feature maps after the last ReLU of each stage, at
        1, 1/2 and 1/4 of the resolution (rounded up); `pool` gives the features before `logits`.
    """
    architecture = ARCHITECTURES[name]
    images = x = keras.Input(input_shape, name="images")
    x = layers.convolution(x, architecture.stem, 3, name="stem_conv")
    x = layers.batch_norm(x, name="stem_bn")
    x = layers.relu(x, name="stem_relu")
    channels = architecture.stem
    for stage, filters in enumerate(architecture.stages, start=1):
        for block in range(1, architecture.blocks + 1):
            prefix = f"stage{stage}_block{block}"
            strides = 2 if stage > 1 and block == 1 else 1
            shortcut = x
            if strides > 1 or channels != filters:
                shortcut = layers.convolution(
                    x, filters, 1, strides=strides, name=f"{prefix}_shortcut_conv"
                )
                shortcut = layers.batch_norm(shortcut, name=f"{prefix}_shortcut_bn")
            x = layers.convolution(x, filters, 3, strides=strides, name=f"{prefix}_conv1")
            x = layers.batch_norm(x, name=f"{prefix}_bn1")
            x = layers.relu(x, name=f"{prefix}_relu1")
            x = layers.convolution(x, filters, 3, name=f"{prefix}_conv2")
            x = layers.batch_norm(x, name=f"{prefix}_bn2")
            x = keras.layers.Add(name=f"{prefix}_add")([x, shortcut])
            last = block == architecture.blocks
            x = layers.relu(x, name=f"stage{stage}" if last else f"{prefix}_relu2")
            channels = filters
    x = layers.global_average_pool(x, name="pool")
    return keras.Model(images, layers.classifier(x, num_classes, name="logits"), name=name)
