"""Wide residual networks for small images.

The networks of Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016, arXiv 1605.07146), in
the form of the public RepDistiller models, without dropout: three stages of pre-activated blocks at
full, half and quarter resolution. At 100 classes the number of trainable parameters is exactly the
reference's.
"""

import re

import keras

from dskd_keras.models import layers

# Blocks, of two convolutions each, in every one of the three stages, and the factor of the stages'
# channels 16, 32 and 64. The depth in the name, 6n + 4, counts the stem, two convolutions in each
# of n blocks in three stages, and the three 1×1 convolutions of the shortcuts.
ARCHITECTURES = {"wrn_16_1": (2, 1), "wrn_16_2": (2, 2), "wrn_40_1": (6, 1), "wrn_40_2": (6, 2)}

# Two halvings leave a feature map of 2×2, the smallest on which the position still says something.
MINIMUM_SIZE = 8


def build(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """Builds one wide residual network, freshly initialised, of arguments checked by `zoo.create`.

    The layers `stage1`, `stage2` and `stage3` give the sums that leave each stage, at 1, 1/2 and
    1/4 of the resolution (rounded up), before the next normalisation and ReLU; `final_relu` gives
    the last feature map, `pool` the features before `logits`.
    """
    blocks, width = ARCHITECTURES[name]
    images = keras.Input(input_shape, name="images")
    channels = 16
    x = layers.convolution(images, channels, 3, name="stem_conv")
    for stage, filters in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for block in range(1, blocks + 1):
            prefix = f"stage{stage}_block{block}"
            strides = 2 if stage > 1 and block == 1 else 1
            shortcut = x
            x = layers.batch_norm(x, name=f"{prefix}_bn1")
            x = keras.layers.ReLU(name=f"{prefix}_relu1")(x)
            if channels != filters:
                # Both branches start from the activated map.
                shortcut = layers.convolution(
                    x, filters, 1, strides=strides, name=f"{prefix}_shortcut_conv"
                )
            x = layers.convolution(x, filters, 3, strides=strides, name=f"{prefix}_conv1")
            x = layers.batch_norm(x, name=f"{prefix}_bn2")
            x = keras.layers.ReLU(name=f"{prefix}_relu2")(x)
            x = layers.convolution(x, filters, 3, name=f"{prefix}_conv2")
            joined = f"stage{stage}" if block == blocks else f"{prefix}_add"
            x = keras.layers.Add(name=joined)([x, shortcut])
            channels = filters
    x = layers.batch_norm(x, name="final_bn")
    x = keras.layers.ReLU(name="final_relu")(x)
    return layers.classifier(images, x, num_classes, name, zero_bias=True)


def torch_module(name: str, layer: str) -> str:
    """Returns what a layer with weights is called in a published PyTorch checkpoint."""
    if match := re.fullmatch(r"stage(\d)_block(\d+)_(\w+)", layer):
        stage, block, role = match.groups()
        role = "convShortcut" if role == "shortcut_conv" else role
        return f"block{stage}.layer.{int(block) - 1}.{role}"
    return {"stem_conv": "conv1", "final_bn": "bn1", "logits": "fc"}[layer]
