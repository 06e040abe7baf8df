"""Every configuration builds its models and heads, and trains."""

from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import small

from dskd_keras.experiment import build, training
from dskd_keras.experiment.command_line import parse
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.run import Run

CONFIGS = Path(__file__).parent.parent / "configs"
CLASSES = {"cifar100": 100, "tiny_imagenet": 200, "digits": 10}


@pytest.fixture(scope="module")
def seen():
    """Names of the models that went through a forward pass already."""
    return set()


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_pair_takes_a_step(path, seen):
    config = parse(ExperimentConfig, ["--pair", path.stem], "train.py")
    classes = CLASSES[config.dataset]
    size = 64 if config.dataset == "tiny_imagenet" else 32
    dataset = SimpleNamespace(num_classes=classes, input_shape=(size, size, 3))
    run = Run(config, dataset, console=None)
    teacher, student = build.create_teacher(run), build.create_student(run)
    distiller = build.distiller(run, teacher, student)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, size, size, 3)).astype("float32")

    for model in (teacher, student):
        if model.name not in seen:  # as the teacher of another pair, say
            logits = model(keras.ops.convert_to_tensor(images), training=False)
            assert logits.shape == (2, classes)
            assert np.isfinite(keras.ops.convert_to_numpy(logits)).all()
            seen.add(model.name)
    heads = distiller(keras.Input((size, size, 3)), training=True)
    supervised = distiller.student_layers
    assert len(supervised) == len(distiller.teacher_layer) >= 3
    assert sorted(heads.deep_logits) == sorted(heads.deep_features) == sorted(supervised)
    # The other backends compile every pair's step for a minute.
    if keras.backend.backend() == "torch":
        before = small.values(student.trainable_variables)
        distiller.compile(keras.optimizers.SGD(config.learning_rate), **training.compile_options())
        logs = distiller.train_on_batch(images, rng.integers(0, classes, 2), return_dict=True)
        assert all(np.isfinite(float(value)) for value in logs.values())
        for layer in supervised:
            assert float(logs[f"deep_prediction_loss/{layer}"]) > 0
            assert float(logs[f"deep_feature_loss/{layer}"]) > 0
        after = small.values(student.trainable_variables)
        assert all((a != b).any() for a, b in zip(before, after, strict=True))
