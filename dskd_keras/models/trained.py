"""`pretrained`, which loads a trained model that this package holds."""

import keras

from dskd_keras.models import cards, zoo


def pretrained(name: str) -> keras.Model:
    """Loads a trained model, say as a teacher that need not be trained first.

    Its card says what it was trained on, how, and how well it does: `pretrained_card(name)`.

    Args:
        name: One of `pretrained_names()`.

    Returns:
        A functional `keras.Model` from normalised images, `[B, height, width, channels]` in the
        order of `keras.config.image_data_format()`, to logits, `[B, num_classes]`. Its weights are
        float32, and were float16 in the file.

    Raises:
        InputError: The name is unknown, or the file is damaged.

    Example:

    ```python
    card = dskd_keras.models.pretrained_card("resnet20_cifar100")
    teacher = dskd_keras.models.pretrained("resnet20_cifar100")
    logits = teacher.predict((pixels / 255 - card.mean) / card.std)  # pixels: [B, 32, 32, 3]
    ```
    """
    card = cards.pretrained_card(name)
    height, width, channels = card.image_shape
    first = keras.config.image_data_format() == "channels_first"
    shape = (channels, height, width) if first else (height, width, channels)
    model = zoo.create(card.architecture, card.num_classes, shape)
    model.load_weights(card.weights())
    return model
