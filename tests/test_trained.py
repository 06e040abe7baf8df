"""The trained models that the package holds, and their cards."""

import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import dskd_keras
from dskd_keras.experiment.command_line import parse
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.models import cards

models = dskd_keras.models
PREPARED = Path(__file__).resolve().parents[2] / "shared" / "tfds"


@pytest.mark.parametrize("name", models.pretrained_names())
def test_a_card_says_what_its_file_holds(name):
    card = models.pretrained_card(name)
    model = models.pretrained(name)
    height, width, channels = card.image_shape
    assert model.name == card.architecture and model.input_shape == (None, height, width, channels)
    assert model.output_shape == (None, card.num_classes)
    assert len(card.mean) == len(card.std) == channels
    for weight in model.weights:
        value = keras.ops.convert_to_numpy(weight)
        assert value.dtype == np.float32
        # Float16 in the file: nothing is lost by writing it as one again.
        assert np.array_equal(value, value.astype("float16").astype("float32")), weight.path
    assert cards.FOLDER.joinpath(f"{name}.weights.h5").stat().st_size < 1_200_000


@pytest.mark.skipif(not PREPARED.is_dir(), reason="needs CIFAR-100")
@pytest.mark.once
@pytest.mark.slow
def test_the_accuracy_on_the_card_is_that_of_the_file():
    card = models.pretrained_card("resnet20_cifar100")
    dataset = dskd_keras.data.load("cifar100", data_dir=PREPARED)
    assert (card.mean, card.std) == (dataset.mean, dataset.std)
    # The first 2,000 of 10,000 images: five standard errors are five points.
    images = (dataset.x_test[:2000] / 255 - card.mean) / card.std
    found = models.pretrained("resnet20_cifar100").predict(images, verbose=0).argmax(-1)
    assert abs(np.mean(found == dataset.y_test[:2000]) - card.test_accuracy) < 0.05


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="TensorFlow has no channels_first convolutions on every processor",
)
def test_both_layouts_give_the_same_logits():
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype("float32")
    one = models.pretrained("resnet20_cifar100")
    expected = keras.ops.convert_to_numpy(one(images))
    keras.config.set_image_data_format("channels_first")
    try:
        other = models.pretrained("resnet20_cifar100")
        found = keras.ops.convert_to_numpy(other(images.transpose(0, 3, 1, 2)))
    finally:
        keras.config.set_image_data_format("channels_last")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.once
def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    for path in cards.FOLDER.glob("resnet20_cifar100.*"):
        content = bytearray(path.read_bytes())
        if path.suffix == ".h5":
            content[-1000] ^= 1
        (tmp_path / path.name).write_bytes(content)
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    config = ExperimentConfig("resnet20", "resnet8", teacher_weights="pretrained:resnet20_cifar100")
    for _ in ("damaged", "missing"):
        said = r": '.*resnet20_cifar100\.weights\.h5' is not the"
        with pytest.raises(dskd_keras.InputError, match="^name" + said):
            models.pretrained("resnet20_cifar100")
        with pytest.raises(dskd_keras.InputError, match="^teacher_weights" + said):
            config.check_teacher_file()
        (tmp_path / "resnet20_cifar100.weights.h5").unlink(missing_ok=True)


@pytest.mark.once
def test_wrong_names_are_refused_before_anything_is_read():
    with pytest.raises(dskd_keras.InputError, match=r"^name: 'resnet21'.*resnet20_cifar100"):
        models.pretrained("resnet21")
    with pytest.raises(dskd_keras.InputError, match=r"^teacher_weights: 'x'.*resnet20_cifar100"):
        ExperimentConfig("resnet20", "resnet8", teacher_weights="pretrained:x")
    with pytest.raises(dskd_keras.InputError, match=r"is a resnet20, but teacher is resnet56\. Ch"):
        ExperimentConfig("resnet56", "resnet8", teacher_weights="pretrained:resnet20_cifar100")


@pytest.mark.once
def test_a_pair_takes_the_teacher_from_the_package():
    config = parse(ExperimentConfig, ["--pair", "resnet20_resnet8_cifar100"], "train.py")
    assert config.teacher_file() == models.pretrained_card("resnet20_cifar100").weights()
    config.check_teacher_file()
    with pytest.raises(dskd_keras.InputError, match=r"teacher_weights: there is no file 'x\.h5'"):
        ExperimentConfig("resnet20", "resnet8", teacher_weights="x.h5").check_teacher_file()


@pytest.mark.once
def test_the_code_of_the_page_runs():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    (code,) = (code for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
               if "pretrained(" in code)  # fmt: skip
    names = {"models": models, "pixels": np.zeros((2, 32, 32, 3), "uint8")}
    exec(code, names)
    assert names["logits"].shape == (2, 100)


@pytest.mark.once
def test_the_cards_are_plain_files():
    for path in cards.FOLDER.glob("*.json"):
        content = json.loads(path.read_text())
        assert 0 < content["test_accuracy"] < 1 and len(content["sha256"]) == 64
