"""What the benchmarks time: functions that train, or run a teacher, for a number of steps."""

import time

import keras
import numpy as np

import dskd_keras
from dskd_keras import data, models
from dskd_keras.experiment import build, training
from dskd_keras.teacher import FrozenTeacher

# Of a residual network: the layers that the peers match, as many as DSKD supervises by default.
_STAGES = ("stage1", "stage2", "stage3")


class Pair:
    """A teacher and a student for random images, and the contenders that are made of them.

    All of them see the same images, train with the same optimizer and are compiled alike. Teacher
    and student are untrained, which costs the same.

    Args:
        config: An `ExperimentConfig`: names, layers, batch size, weights.
        classes: Number of classes.
        size: Height and width of the images.
        batches: Different batches.
    """

    def __init__(self, config, classes=100, size=32, batches=8):
        self.config = config
        self.classes = classes
        shape = (size, size, 3)
        if keras.config.image_data_format() == "channels_first":
            shape = (3, size, size)
        self.shape = shape
        rng = np.random.default_rng(0)
        count = batches * config.batch_size
        self.x = rng.standard_normal((count, *shape)).astype("float32")
        self.y = rng.integers(0, classes, count).astype("int32")
        self.plain = self._model(config.teacher)

    def _model(self, name):
        model = models.create(name, self.classes, self.shape)
        for layer in model.layers:
            # Untrained, with moving averages of 0 and 1, so deep a model overflows.
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.gamma.assign(0.3 * layer.gamma)
        return model

    def teacher(self, dtype=None):
        """Returns the teacher as it is, or folded and with that dtype."""
        return self.plain if dtype is None else dskd_keras.fold_batch_norm(self.plain, dtype)

    def distiller(self, teacher, layers=None, **settings):
        """Returns a compiled `Distiller` of a new student."""
        layers = self.config.student_layers if layers is None else layers
        distiller = dskd_keras.Distiller(
            teacher, self._model(self.config.student), layers, **settings
        )
        if distiller.traced_training is not None:
            distiller.traced_training.after = 0  # as train.py has it
        return self._compiled(distiller)

    def _compiled(self, model):
        model.compile(
            training.optimizer(self.config, 100_000),
            **training.compile_options(),
        )
        return model

    def student_alone(self):
        """Ordinary training, on the labels."""
        return self._fit(self.distiller(None, (), prediction_weight=0), self.y)

    def student_with_heads(self, dtype="float32"):
        """DSKD with the teacher's outputs computed beforehand."""
        distiller = self.distiller(self.teacher(dtype))
        return self._fit(
            distiller, distiller.targets(self.x, self.y, batch_size=self.config.batch_size)
        )

    def dskd(self, dtype="float32"):
        """The whole step."""
        return self._fit(self.distiller(self.teacher(dtype)), self.y)

    def dskd_over(self, dtype="float32"):
        """The step when deep supervision is over."""
        distiller = self.distiller(self.teacher(dtype))
        distiller.deep_prediction_weight = distiller.deep_feature_weight = 0
        return self._fit(distiller, self.y)

    def kd(self, dtype="float32"):
        """Plain distillation: no heads."""
        return self._fit(self.distiller(self.teacher(dtype), ()), self.y)

    def keras_distillation(self, dtype=None):
        """`keras.distillation.Distiller`: logits, and each stage's feature map, as `torch_loop`."""
        from keras.distillation import Distiller, FeatureDistillation, LogitsDistillation

        losses = [
            LogitsDistillation(
                temperature=self.config.temperature, loss=keras.losses.KLDivergence()
            ),
            *(
                FeatureDistillation("mse", teacher_layer_name=name, student_layer_name=name)
                for name in _STAGES
            ),
        ]
        model = self._compiled(
            Distiller(self.teacher(dtype), self._model(self.config.student), losses)
        )
        return self._fit(model, self.y)

    def can_use_keras_distillation(self):
        """Returns whether the feature maps have equal shapes, which it needs."""
        student = models.create(self.config.student, self.classes, self.shape)
        return all(
            student.get_layer(name).output.shape == self.plain.get_layer(name).output.shape
            for name in _STAGES
        )

    def augmented_batches(self):
        """The input alone, as `train.py` prepares it in a thread beside the steps."""
        rng = np.random.default_rng(0)
        height, width = self.shape[1:] if self.shape[0] == 3 else self.shape[:2]
        images = rng.integers(0, 256, (5000, height, width, 3), "uint8")
        batches = data.TrainingBatches(
            images, rng.integers(0, self.classes, 5000), self.config.batch_size, 0, [0.5] * 3,
            [0.25] * 3,
        )  # fmt: skip

        def contender(steps):
            steps *= 20  # one takes too little time to be measured
            start = time.perf_counter()
            for step in range(steps):
                batches[step]
            return (time.perf_counter() - start) / steps

        return contender

    def frozen_teacher(self, dtype=None):
        """The teacher alone, with the outputs that DSKD needs."""
        teacher = self.teacher(dtype)
        frozen = FrozenTeacher(teacher, layer=build.teacher_layers(self.config, teacher))
        run = _compiled_call(frozen)
        size = self.config.batch_size

        def contender(steps):
            start = time.perf_counter()
            for step in range(steps):
                begin = step * size % len(self.x)
                outputs = run(self.x[begin : begin + size])
            # Outputs come in order: with the last one all are there.
            keras.ops.convert_to_numpy(outputs["logits"])
            return (time.perf_counter() - start) / steps

        return contender

    def torch_loop(self, dtype=None):
        """The same pair in plain PyTorch."""
        from benchmarks import torch_loop

        x = self.x
        if x.shape[-1] == 3:
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        return torch_loop.Loop(
            self.config.teacher, self.config.student, self.classes, x, self.y.astype("int64"),
            self.config.batch_size, dtype,
        )  # fmt: skip

    def _fit(self, model, targets):
        size = self.config.batch_size
        timer = _EpochTimer()

        def contender(steps):
            images = min(steps * size, len(self.x))
            part = keras.tree.map_structure(lambda a: a[:images], targets)
            epochs = max(1, steps * size // images)
            model.fit(
                self.x[:images], part, batch_size=size, epochs=epochs, shuffle=False, verbose=0,
                callbacks=[timer],
            )  # fmt: skip
            return timer.seconds / (epochs * images / size)

        return contender


class _EpochTimer(keras.callbacks.Callback):
    """Seconds of the epochs of one `fit`, without what comes before and after them."""

    def on_train_begin(self, logs=None):
        self.seconds = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        # The logs are numbers by now: the last step is done.
        self.seconds += time.perf_counter() - self._start


def _compiled_call(frozen):
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(frozen)
    if backend == "jax":
        import jax

        run = jax.jit(lambda values, x: frozen(x, values))
        # Read every time: `fit` gives the buffers of a teacher away, and puts new ones back.
        return lambda x: run([variable.value for variable in frozen.variables], x)

    def run(x):
        import torch

        with torch.no_grad():
            return frozen(keras.ops.convert_to_tensor(x))

    return run
