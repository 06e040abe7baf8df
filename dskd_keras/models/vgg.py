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
    """Builds one VGG network, freshly initialised, of arguments that `zoo.create` has checked.

    The layers `stage1` to `stage5` give the feature maps after the last ReLU of each stage, at 1,
    1/2, 1/4, 1/8 and 1/8 of the resolution (rounded down); from 64×64 on the last is at 1/16.
    `pool` gives the features before `logits`.
    """
    images = x = keras.Input(input_shape, name="images")
    convolutions = ARCHITECTURES[name]
    for stage, (count, filters) in enumerate(zip(convolutions, _CHANNELS, strict=True), start=1):
        prefix = f"stage{stage}"
        for index in range(1, count + 1):
            x = layers.normalized_convolution(
                x, filters, 3, prefix, index, use_bias=True, activate=False
            )
            x = keras.layers.ReLU(name=prefix if index == count else f"{prefix}_relu{index}")(x)
        if stage < 4 or (stage == 4 and min(layers.size(images)) >= _FOURTH_POOLING):
            x = keras.layers.MaxPooling2D(2, name=f"{prefix}_pool")(x)
    return layers.classifier(images, x, num_classes, name, std=0.01, zero_bias=True)


def torch_module(name: str, layer: str) -> str:
    """Returns what a layer with weights is called in a published PyTorch checkpoint.

    There a stage is a sequence of convolution, normalisation and ReLU, counted from 0.
    """
    if match := re.fullmatch(r"stage(\d)_(conv|bn)(\d)", layer):
        stage, kind, index = match.groups()
        return f"block{int(stage) - 1}.{3 * (int(index) - 1) + (kind == 'bn')}"
    return {"logits": "classifier"}[layer]
