"""What a trained model does on the test set, how long it takes, and what computed it."""

import importlib.metadata
import statistics
import time
from typing import Any

import keras
import numpy as np

from dskd_keras.data import ImageDataset
from dskd_keras.distiller import Distiller
from dskd_keras.experiment.run import Run
from dskd_keras.experiment.training import evaluation_batches

_LATENCY_REPETITIONS = 20


def predicted_logits(model: keras.Model, dataset: ImageDataset) -> np.ndarray:
    """Returns the logits of a model for the N test images, float `[N, C]`."""
    return model.predict(evaluation_batches(dataset, "test"), verbose=0)


def predicted_classes(model: keras.Model, dataset: ImageDataset) -> np.ndarray:
    """Returns the classes that a model predicts for the test images, int `[N]`."""
    return np.argmax(predicted_logits(model, dataset), axis=-1)


def head_accuracies(distiller: Distiller, run: Run) -> dict[str, float]:
    """Returns the test accuracy, 0 to 1, of every auxiliary head by layer name.

    Empty where deep supervision ended before the training did: from then on the student went on
    without its heads.
    """
    dataset = run.dataset
    heads = distiller.student_with_heads
    deep_logits = heads.output.deep_logits
    if not deep_logits or not distiller.deep_prediction_weight:
        return {}
    # A dict: of a list with one output Keras makes the output itself.
    model = run.devices.copied(keras.Model(heads.inputs, dict(deep_logits)))
    predictions = model.predict(evaluation_batches(dataset, "test"), verbose=0)
    return {
        layer: accuracy(np.argmax(predictions[layer], axis=-1), dataset) for layer in deep_logits
    }


def accuracy(classes: np.ndarray, dataset: ImageDataset) -> float:
    """Returns the share of test images, 0 to 1, whose predicted class is right."""
    return float(np.mean(classes == dataset.y_test))


def latency_ms(model: keras.Model) -> float:
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


def weight_bytes(model: keras.Model) -> int:
    """Returns the size of a model's weights in bytes."""
    return sum(keras.ops.convert_to_numpy(weight).nbytes for weight in model.weights)


def parameters(model: keras.Model) -> int:
    """Returns the number of a model's trainable parameters."""
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def software() -> dict[str, Any]:
    """Returns the backend and the versions of what computes, fields of `RunResult`."""
    backend = keras.backend.backend()
    names = ("keras", backend, "numpy")
    return {
        "backend": backend,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
