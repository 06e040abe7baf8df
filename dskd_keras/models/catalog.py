"""The names of the zoo's models and their families, known without Keras."""

from dskd_keras.errors import unknown_name

# The module of this package that builds each model. A family's module has `ARCHITECTURES` (by
# name), `MINIMUM_SIZE` (of an image's height and width), `build(name, num_classes, input_shape)`,
# and `torch_module(name, layer)`, which says what a layer with weights is called in the family's
# published PyTorch checkpoints.
FAMILIES: dict[str, str] = {
    name: family
    for family, names_of_family in {
        "resnet": (
            "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
            "resnet8x4", "resnet32x4", "resnet18", "ResNet50",
        ),
        "wide_resnet": ("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"),
        "vgg": ("vgg8", "vgg11", "vgg13", "vgg16", "vgg19"),
        "mobilenet": ("MobileNetV2", "MobileNetV2_tinyimagenet"),
        "shufflenet": ("ShuffleV1", "ShuffleV2"),
    }.items()
    for name in names_of_family
}  # fmt: skip


def names() -> list[str]:
    """Returns the names that `create` knows, family by family, small models first."""
    return list(FAMILIES)


def check_name(field: str, name: str) -> str:
    """Returns a model's name as `names()` spells it, or raises `InputError` about `field`."""
    canonical = {known.casefold(): known for known in FAMILIES}.get(str(name).casefold())
    if canonical is None:
        raise unknown_name(field, name, FAMILIES)
    return canonical
