"""VGG networks with batch normalisation for small images.

The networks of Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition" (ICLR 2015, arXiv 1409.1556, table 1), in the form of the public RepDistiller models:
five stages of 3×3 convolutions, each normalised, global average pooling and one linear layer in
place of the three. `vgg8` is that collection's own. At 100 classes the number of trainable
parameters is exactly the reference's.
"""

import re

import keras

from dskd_keras.models import layers

# Convolutions in each stage; the depth in the name counts them and the paper's three linear layers.
ARCHITECTURES = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
_CHANNELS = (64, 128, 256, 512, 512)

# Three halvings leave a feature map of 2×2, the smallest on which the position still says
# something.
MINIMUM_SIZE = 16

# From this height and width on, the last stage works at half the resolution of the one before.
_FOURTH_POOLING = 64


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """Builds one VGG network with freshly initialised weights.

    Args:
        name: A key of `ARCHITECTURES`; it becomes the name of the model.
        num_classes: Number of classes.
        input_shape: Shape of one image, in the order of `keras.config.image_data_format()`.

    Returns:
        A functional model from images `[B, *input_shape]` to logits `[B, num_classes]`. The layers
        `stage1` to `stage5` give the feature maps after the last ReLU of each stage, at 1, 1/2,
        1/4, 1/8 and 1/8 of the resolution (rounded down); from 64×64 on the last is at 1/16.
        `pool` gives the features before `logits`.
    """
    images = x = keras.Input(input_shape, name="images")
    convolutions = ARCHITECTURES[name]
    for stage, (count, filters) in enumerate(zip(convolutions, _CHANNELS, strict=True), start=1):
        for index in range(1, count + 1):
            prefix = f"stage{stage}"
            x = layers.convolution(x, filters, 3, name=f"{prefix}_conv{index}", use_bias=True)
            x = layers.batch_norm(x, name=f"{prefix}_bn{index}")
            x = layers.relu(x, name=prefix if index == count else f"{prefix}_relu{index}")
        if stage < 4 or (stage == 4 and min(layers.size(images)) >= _FOURTH_POOLING):
            x = layers.max_pool(x, name=f"stage{stage}_pool")
    x = layers.global_average_pool(x, name="pool")
    logits = layers.classifier(
        x,
        num_classes,
        name="logits",
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        bias_initializer="zeros",
    )
    return keras.Model(images, logits, name=name)


def torch_module(name: str, layer: str) -> str:
    """Returns what a layer with weights is called in a published PyTorch checkpoint.

    There a stage is a sequence of convolution, normalisation and ReLU, counted from 0.
    """
    if match := re.fullmatch(r"stage(\d)_(conv|bn)(\d)", layer):
        stage, kind, index = match.groups()
        return f"block{int(stage) - 1}.{3 * (int(index) - 1) + (kind == 'bn')}"
    return {"logits": "classifier"}[layer]
