"""What a trained model does on the test set, and how long it takes."""

import statistics
import time

import keras
import numpy as np

from dskd_keras.training import evaluation_batches

_LATENCY_REPETITIONS = 20


def predicted_logits(model, dataset):
    """Returns the logits of a model for the test images.

    Args:
        model: A model with logits `[B, C]`.
        dataset: A `data.Dataset` of N test images.

    Returns:
        float array `[N, C]`.
    """
    return model.predict(evaluation_batches(dataset, "test"), verbose=0)


def predicted_classes(model, dataset):
    """Returns the classes that a model predicts for the test images, int array `[N]`."""
    return np.argmax(predicted_logits(model, dataset), axis=-1)


def head_accuracies(distiller, dataset):
    """Returns the test accuracy, 0 to 1, of every auxiliary head, a dict by layer name."""
    heads = distiller.student_with_heads
    deep_logits = heads.output.deep_logits
    if not deep_logits:
        return {}
    # A dict: of a list with one output Keras makes the output itself.
    model = keras.Model(heads.inputs, dict(deep_logits))
    predictions = model.predict(evaluation_batches(dataset, "test"), verbose=0)
    return {
        layer: accuracy(np.argmax(predictions[layer], axis=-1), dataset) for layer in deep_logits
    }


def accuracy(classes, dataset):
    """Returns the share of test images, 0 to 1, whose predicted class is right."""
    return float(np.mean(classes == dataset.y_test))


def confusion(classes, dataset):
    """Returns how many test images of each class (row) were taken for each (column): `[C, C]`."""
    counts = np.zeros((dataset.num_classes, dataset.num_classes), np.int64)
    np.add.at(counts, (dataset.y_test, classes), 1)
    return counts


def latency_ms(model):
    """Returns the median time of predicting one image, in milliseconds.

    `predict_on_batch` is timed: the compiled model with what Keras and the copy of the image to the
    device and of the logits back add.
    """
    image = np.zeros((1, *model.inputs[0].shape[1:]), "float32")
    model.predict_on_batch(image)  # compiles
    times = []
    for _ in range(_LATENCY_REPETITIONS):
        start = time.perf_counter()
        model.predict_on_batch(image)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def weight_bytes(model):
    """Returns the size of a model's weights in bytes."""
    return sum(keras.ops.convert_to_numpy(weight).nbytes for weight in model.weights)
