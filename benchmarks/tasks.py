"""Whether a student that is distilled beats the same student trained alone, on five small tasks.

    python -m benchmarks.tasks

A teacher is trained for each task. Then the student is trained by every method for the same number
of steps, on the teacher's training set, and measured after the last epoch. The seed decides its
initialisation and the order of the examples, whatever the method. `KERAS_BACKEND` picks the
backend.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Literal

import jsonargparse
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import task_data, timing
from dskd_commands import startup

startup.set_tensorflow_options()
import keras  # noqa: E402
from keras import layers, ops  # noqa: E402

import dskd_keras  # noqa: E402

Name = Literal["text", "tokens", "segmentation", "table", "multi-label"]

# XLA takes longer to compile these models for a CPU than it saves.
_JIT = False if keras.backend.backend() == "tensorflow" else "auto"

_TEACHER_SEED = 1000

# All with the distiller's defaults, but for the coefficient of DSKD's feature maps.
METHODS = {
    "alone": lambda task, teacher, _: dskd_keras.Distiller(
        None, task.student(), prediction_weight=0
    ),
    "kd": lambda task, teacher, _: dskd_keras.Distiller(teacher, task.student()),
    "dskd": lambda task, teacher, weight: dskd_keras.Distiller(
        teacher, task.student(), task.student_layers, deep_feature_weight=weight
    ),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: its data, models and training, which is the same for all methods.

    Attributes:
        data: Returns `task_data.Splits`, whose training set divides into batches.
        teacher: Returns an untrained teacher.
        student: Returns an untrained student.
        student_layers: What DSKD supervises.
        loss: Returns the loss on the labels.
        metric: A function of labels and logits.
        measure: What the metric is.
        teacher_epochs: How long the teacher is trained.
        epochs: How long the student is.
        batch_size: For both.
        learning_rate: Adam's at the beginning, for both; it falls to 0 along a cosine.
    """

    data: Callable[[], task_data.Splits]
    teacher: Callable[[], keras.Model]
    student: Callable[[], keras.Model]
    student_layers: tuple[str, ...]
    loss: Callable[[], keras.losses.Loss]
    metric: Callable[[np.ndarray, np.ndarray], float]
    measure: str
    teacher_epochs: int
    epochs: int
    batch_size: int
    learning_rate: float = 4e-3


def main(
    task: Name | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    held_out: Literal["test", "validation"] = "test",
    json_file: str | None = None,
    deep_feature_weight: float = 1.0,
):
    """Trains the students of five tasks alone, with KD and with DSKD.

    Args:
        task: One of them. Default: all.
        seeds: Of the student's initialisation and the order of the examples.
        held_out: What is measured on. The tasks were set up with the validation set and seed 100.
        json_file: Where to write the results too.
        deep_feature_weight: Of DSKD's distiller. The default is the distiller's.
    """
    results = {}
    for name in [task] if task else TASKS:
        results[name] = run(name, seeds, held_out, deep_feature_weight)
        # After each task: an interrupted run keeps what is done.
        timing.write_json(
            json_file,
            {
                "backend": keras.backend.backend(),
                "held_out": held_out,
                "seeds": list(seeds),
                "deep_feature_weight": deep_feature_weight,
                **timing.machine(),
                "tasks": results,
            },
        )
    Console(width=120).print(table(results, held_out))


def run(name, seeds, held_out="test", deep_feature_weight=1.0):
    """Trains a task's teacher, and its student by every method with every seed.

    Args:
        name: Of the task.
        seeds: Those of the students.
        held_out: The split that is measured on.
        deep_feature_weight: Of DSKD's distiller.

    Returns:
        A dict: what is measured, what the teacher reached and, for each method, what the students
        did by seed, all in percent; sizes, and seconds.
    """
    task, start = TASKS[name], time.perf_counter()
    splits = task.data()
    examples = getattr(splits, held_out)

    def trained(model, epochs, seed, what):
        train(task, model, splits.train, epochs, seed)
        value = measure(task, model, examples)
        print(f"{name}: {what} {value:.2f}, {time.perf_counter() - start:.0f} s", flush=True)
        return value

    keras.utils.set_random_seed(_TEACHER_SEED)
    teacher = task.teacher()
    of_teacher = trained(teacher, task.teacher_epochs, _TEACHER_SEED, "teacher")
    students = {method: [] for method in METHODS}
    for seed in seeds:
        for method, distiller in METHODS.items():
            # Here, so that the student begins with the same weights whatever the method.
            keras.utils.set_random_seed(seed)
            model = distiller(task, teacher, deep_feature_weight)
            students[method].append(trained(model, task.epochs, seed, f"seed {seed}, {method}"))
    return {
        "measure": task.measure,
        "teacher": of_teacher,
        **students,
        "parameters": {
            "teacher": teacher.count_params(),
            "student": model.student.count_params(),
        },
        "training_examples": len(splits.train.x),
        "steps": task.epochs * len(splits.train.x) // task.batch_size,
        "seconds": time.perf_counter() - start,
    }


def train(task, model, examples, epochs, seed):
    """Trains a model or a distiller for a number of epochs, in an order that the seed decides."""
    rng = np.random.default_rng(seed)
    # All epochs in a row: the order is then the same whatever else draws random numbers.
    order = np.concatenate([rng.permutation(len(examples.x)) for _ in range(epochs)])
    steps = len(order) // task.batch_size
    rate = keras.optimizers.schedules.CosineDecay(task.learning_rate, steps)
    model.compile(optimizer=keras.optimizers.Adam(rate), loss=task.loss(), jit_compile=_JIT)
    x, y = (part[order] for part in examples)
    model.fit(x, y, batch_size=task.batch_size, shuffle=False, verbose=0)


def measure(task, model, examples):
    """Returns the task's metric of a model, in percent."""
    return 100 * task.metric(examples.y, model.predict(examples.x, batch_size=250, verbose=0))


def accuracy(y, logits):
    """Returns the share of examples that get the right class."""
    return float(np.mean(logits.argmax(-1) == y))


def macro_accuracy(y, logits):
    """Returns the mean over the classes of the share of their valid positions that get them."""
    right = logits.argmax(-1) == y
    classes = np.unique(y[y != task_data.IGNORED])
    return float(np.mean([right[y == each].mean() for each in classes]))


def exact_match(y, logits):
    """Returns the share of examples all labels of which are right."""
    return float(np.mean(((logits > 0) == (y > 0)).all(-1)))


def of_classes():
    """Returns the loss on classes; those of some positions may count nowhere."""
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=task_data.IGNORED
    )


def of_labels():
    """Returns the loss on several labels."""
    return keras.losses.BinaryCrossentropy(from_logits=True)


def recurrent(width, dropout=0.0, length=16):
    """Returns a text classifier: two recurrent layers, the average over the words, logits."""
    words = keras.Input((length,), dtype="int32")
    x = layers.Embedding(task_data.WORDS, width, mask_zero=True)(words)
    for layer in range(2):
        x = layers.Dropout(dropout)(x)
        x = layers.GRU(width, return_sequences=True, name=f"layer{layer + 1}")(x)
    x = layers.Dropout(dropout)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(words, layers.Dense(2 * task_data.TOPICS)(x))


def transformer(width, blocks, heads, length=16):
    """Returns a text classifier: blocks of attention, the average over the words, logits."""
    words = keras.Input((length,), dtype="int32")
    x = layers.Embedding(task_data.WORDS, width, mask_zero=True)(words)
    places = ops.cumsum(ops.ones_like(words), axis=1) - 1
    x = layers.Add()([x, layers.Embedding(length, width)(places)])
    for block in range(blocks):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(heads, width // heads)(y, y)])
        y = layers.Dense(2 * width, activation="relu")(layers.LayerNormalization()(x))
        x = layers.Add(name=f"block{block + 1}")([x, layers.Dense(width)(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(words, layers.Dense(2 * task_data.TOPICS)(x))


def tagger(width, dropout=0.0, length=24):
    """Returns a token classifier: two recurrent layers over the tokens, then logits at each."""
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(task_data.TOKENS, width, mask_zero=True)(tokens)
    for layer in range(2):
        x = layers.GRU(width, return_sequences=True, name=f"layer{layer + 1}")(x)
        x = layers.Dropout(dropout)(x)
    return keras.Model(tokens, layers.Dense(1 + task_data.OPENING)(x))


def u_net(width, dropout=0.0, size=20):
    """Returns a segmenter: down to a quarter of the size and up again, with skips."""
    picture = keras.Input((size, size, 1))
    first = _block(picture, width, "down1")
    second = _block(layers.MaxPooling2D()(first), 2 * width, "down2")
    x = _block(layers.MaxPooling2D()(second), 2 * width, "bottom")
    x = layers.Concatenate()([layers.UpSampling2D()(layers.Dropout(dropout)(x)), second])
    x = _block(x, 2 * width, "up2")
    x = _block(layers.Concatenate()([layers.UpSampling2D()(x), first]), width, "up1")
    return keras.Model(picture, layers.Conv2D(11, 1)(x))


def convolutional(width, dropout=0.0, size=20):
    """Returns a classifier of pictures: three stages of convolutions, then logits."""
    picture = keras.Input((size, size, 1))
    x = _block(picture, width, "stage1")
    x = _block(layers.MaxPooling2D()(x), 2 * width, "stage2")
    x = _block(layers.MaxPooling2D()(x), 4 * width, "stage3")
    x = layers.GlobalMaxPooling2D()(x)
    return keras.Model(picture, layers.Dense(10)(layers.Dropout(dropout)(x)))


def _block(x, width, name):
    x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
    return layers.ReLU(name=name)(layers.BatchNormalization(momentum=0.9)(x))


def perceptron(width, depth, dropout=0.0):
    """Returns a classifier of rows: dense layers, then logits."""
    row = x = keras.Input((30,))
    for layer in range(depth):
        x = layers.Dense(width, activation="relu", name=f"layer{layer + 1}")(x)
        x = layers.Dropout(dropout)(x)
    return keras.Model(row, layers.Dense(8)(x))


TASKS = {
    "text": Task(
        data=task_data.text,
        teacher=lambda: recurrent(64, dropout=0.3),
        student=lambda: transformer(16, blocks=2, heads=2),
        student_layers=("block1",),
        loss=of_classes,
        metric=accuracy,
        measure="accuracy",
        teacher_epochs=20,
        epochs=15,
        batch_size=64,
    ),
    "tokens": Task(
        data=task_data.brackets,
        teacher=lambda: tagger(64, dropout=0.1),
        student=lambda: tagger(16),
        student_layers=("layer1",),
        loss=of_classes,
        metric=macro_accuracy,
        measure="macro accuracy, tokens",
        teacher_epochs=25,
        epochs=20,
        batch_size=64,
    ),
    "segmentation": Task(
        data=task_data.segmentation,
        teacher=lambda: u_net(24, dropout=0.2),
        student=lambda: u_net(6),
        student_layers=("bottom", "up2"),
        loss=of_classes,
        metric=macro_accuracy,
        measure="macro accuracy, pixels",
        teacher_epochs=25,
        epochs=25,
        batch_size=20,
    ),
    "table": Task(
        data=task_data.table,
        teacher=lambda: perceptron(256, depth=3, dropout=0.3),
        student=lambda: perceptron(24, depth=2),
        student_layers=("layer1",),
        loss=of_classes,
        metric=accuracy,
        measure="accuracy",
        teacher_epochs=40,
        epochs=30,
        batch_size=32,
        learning_rate=2e-3,
    ),
    "multi-label": Task(
        data=task_data.multi_label,
        teacher=lambda: convolutional(24, dropout=0.3),
        student=lambda: convolutional(8),
        student_layers=("stage1", "stage2"),
        loss=of_labels,
        metric=exact_match,
        measure="all ten labels right",
        teacher_epochs=30,
        epochs=30,
        batch_size=64,
    ),
}


def table(results, held_out):
    """Returns the table: means and standard deviations over the seeds, and paired differences."""
    shown = Table("task", "measure, %", title=f"On the {held_out} set, after the last epoch")
    for column in ("teacher", *METHODS, "kd − alone, by seed", "dskd − alone, by seed"):
        shown.add_column(column, justify="right")
    for name, result in results.items():
        shown.add_row(
            name,
            result["measure"],
            f"{result['teacher']:.1f}",
            *(_mean(result[method]) for method in METHODS),
            *(_differences(result, method) for method in ("kd", "dskd")),
        )
    return shown


def _mean(values):
    spread = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.1f} ± {spread:.1f}"


def _differences(result, method):
    pairs = zip(result[method], result["alone"], strict=True)
    return " ".join(f"{distilled - alone:+.1f}" for distilled, alone in pairs)


if __name__ == "__main__":
    parser = jsonargparse.ArgumentParser(description=main.__doc__.partition("\n")[0])
    parser.add_function_arguments(main, skip={"seeds"})
    # A list of the function's would have to be typed with brackets.
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="Of the student's initialisation and the order of the examples.",
    )
    main(**vars(parser.parse_args()))
