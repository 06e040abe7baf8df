"""Published PyTorch checkpoints: the reference's outputs from its weights, and what is refused."""

import argparse
import json
import re
import sys
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest

from dskd_keras import models
from dskd_keras.errors import InputError

torch = pytest.importorskip("torch")

REFERENCES = sorted((Path(__file__).parent / "reference").glob("*.json"))
# One of each kind of layer; vgg8_64 has a map with as many columns as channels.
CHANNELS_FIRST = ("ShuffleV1", "ShuffleV2", "resnet8x4", "vgg8_64")
if keras.backend.backend() == "torch":
    CHANNELS_FIRST += ("MobileNetV2",)
# PyTorch, which compiles nothing, takes all of the references, the other backends one of each kind:
# blocks, stems, shortcuts, and images on which the stages halve differently.
EVERYWHERE = (
    "MobileNetV2", "MobileNetV2_tinyimagenet", "ShuffleV1", "ShuffleV2", "resnet8x4", "resnet18",
    "vgg8_64", "wrn_16_2",
)  # fmt: skip


@pytest.fixture
def channels_first():
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format("channels_last")


def tensor(key, shape):
    """The tensor of the reference models for a `state_dict` key: a function of the key alone."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) >= 2:
        value = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
    elif key.endswith("weight"):
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = 0.1 * rng.standard_normal(shape)
    return torch.from_numpy(value.astype("float32"))


def state_dict(reference):
    return {key: tensor(key, shape) for key, shape in reference["state_dict"]}


def features_and_logits(model, images):
    """The maps from the stem to the pooled vector, and the logits, as NumPy arrays."""
    names = [layer.name for layer in model.layers]
    stem = [name for name in ("stem_relu", "stem_conv") if name in names][:1]
    stages = [name for name in names if re.fullmatch(r"stage\d", name)]
    taps = [*stem, *stages, "pool", "logits"]
    tapped = keras.Model(model.input, [model.get_layer(tap).output for tap in taps])
    if keras.backend.backend() == "tensorflow" and images.shape[1] == 3:
        import tensorflow as tf

        # TensorFlow's own convolutions want channels last on a CPU.
        outputs = tf.function(tapped, jit_compile=True)(images)
    elif keras.backend.backend() == "jax":
        import jax

        # Compiled whole: one by one, the operations take five times as long.
        variables = (tapped.trainable_variables, tapped.non_trainable_variables)
        values = [[variable.value for variable in some] for some in variables]
        outputs, _ = jax.jit(tapped.stateless_call)(*values, images)
    else:
        with torch.no_grad():
            outputs = tapped(keras.ops.convert_to_tensor(images), training=False)
    *features, logits = map(keras.ops.convert_to_numpy, outputs)
    return features, logits


def cases():
    for path in REFERENCES:
        if path.stem not in EVERYWHERE and keras.backend.backend() != "torch":
            continue
        yield pytest.param(path, "channels_last", id=path.stem)
        if path.stem in CHANNELS_FIRST:
            yield pytest.param(path, "channels_first", id=f"{path.stem}-channels_first")


@pytest.mark.parametrize(("path", "data_format"), cases())
def test_the_reference_logits_and_features(path, data_format, tmp_path, request):
    reference = json.loads(path.read_text())
    images = np.random.default_rng(0).standard_normal(reference["input_shape"]).astype("float32")
    if data_format == "channels_first":
        request.getfixturevalue("channels_first")
    else:
        images = images.transpose(0, 2, 3, 1)
    torch.save({"epoch": 240, "model": state_dict(reference)}, tmp_path / "model.pth")
    model = models.create(reference["model"], reference["num_classes"], images.shape[1:])
    parameters = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert parameters == reference["trainable_parameters"]
    assert models.load_torch_weights(model, tmp_path / "model.pth") is model

    features, logits = features_and_logits(model, images)
    expected = np.array(reference["logits"])
    assert np.abs(logits - expected).max() / expected.std() < 5e-5
    for feature, statistics in zip(features, reference["features"], strict=True):
        if feature.ndim == 4 and data_format == "channels_last":
            feature = feature.transpose(0, 3, 1, 2)
        assert list(feature.shape) == statistics["shape"]
        scale = statistics["abs_mean"]
        assert abs(feature.mean() - statistics["mean"]) < 5e-5 * scale
        assert abs(np.abs(feature).mean() - scale) < 5e-5 * scale
        assert abs(feature.std(ddof=1) / statistics["std"] - 1) < 5e-5


def test_every_model_has_a_reference():
    assert {json.loads(path.read_text())["model"] for path in REFERENCES} == set(models.names())


@pytest.fixture(scope="module")
def resnet8():
    """The reference's `state_dict`."""
    return state_dict(json.loads((REFERENCES[0].parent / "resnet8.json").read_text()))


def create(classes=100):
    return models.create("resnet8", classes, (32, 32, 3))


def stem_kernel(model):
    return keras.ops.convert_to_numpy(model.get_layer("stem_conv").kernel)


@pytest.mark.once
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {f"module.{key}": value for key, value in tensors.items()},
        lambda tensors: {"model": {f"module.{key}": value for key, value in tensors.items()}},
        # What scripts save beside: options, an optimizer's state, NumPy's numbers.
        lambda tensors: {
            "opt": argparse.Namespace(lr=0.05, decay=[150, 180]),
            "model": tensors,
            "accuracy": torch.tensor(70.5),
            "best_acc": np.float64(70.5),
            "history": np.arange(3.0),
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []},
        },
        lambda tensors: {key: value.double() for key, value in tensors.items()},
    ],
    ids=["bare", "state_dict", "parallel", "model-parallel", "with-options", "double"],
)
def test_what_the_projects_publish(resnet8, wrap, zipped, tmp_path):
    torch.save(wrap(resnet8), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    model = models.load_torch_weights(create(), tmp_path / "x.pth")
    expected = resnet8["conv1.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(stem_kernel(model), expected)
    moving = model.get_layer("stage3_block1_shortcut_bn").moving_variance
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(moving), resnet8["layer3.0.downsample.1.running_var"]
    )


def without(tensors, *keys):
    return {key: value for key, value in tensors.items() if key not in keys}


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "classes", "message"),
    [
        (lambda t: without(t, "bn1.bias"), 100,
         r"missing keys: bn1\.bias; unexpected keys: none; shapes that differ: none\.$"),
        (lambda t: {**t, "head.weight": torch.zeros(2, 2)}, 100,
         r"missing keys: none; unexpected keys: head\.weight; shapes that differ: none\.$"),
        (lambda t: t, 10,
         r"missing keys: none; unexpected keys: none; shapes that differ: fc\.weight \(100, 64\) "
         r"instead of \(10, 64\), fc\.bias \(100,\) instead of \(10,\)\.$"),
        (lambda t: {f"x.{key}": value for key, value in t.items()}, 100,
         r"missing keys: conv1\.weight, .* and 39 more; unexpected keys: x\.conv1\.weight, "),
        (lambda t: {**t, "conv1.weight": t["conv1.weight"][..., None]}, 100,
         r"conv1\.weight \(16, 3, 3, 3, 1\) instead of \(16, 3, 3, 3\)\.$"),
        (lambda t: {**t, "fc.bias": torch.full((100,), float("nan"))}, 100,
         r"has values that are not finite in fc\.bias\.$"),
        (lambda t: {"model": {"net": t}}, 100, r"holds a dict with model, where a state_dict"),
        (lambda t: [t], 100, r"holds a list, where a state_dict is expected"),
        (lambda t: {"weights": t}, 100, r"alone or under 'model' or 'state_dict'\.$"),
    ],
    ids=["missing", "unexpected", "classes", "foreign", "rank", "nan", "nested", "list", "wrapper"],
)  # fmt: skip
def test_what_does_not_fit_is_listed(resnet8, change, classes, message, tmp_path):
    torch.save(change(resnet8), tmp_path / "x.pth")
    model = create(classes)
    before = stem_kernel(model)
    with pytest.raises(InputError, match=message) as error:
        models.load_torch_weights(model, tmp_path / "x.pth", field="teacher_weights")
    assert str(error.value).startswith(f"teacher_weights: '{tmp_path / 'x.pth'}'")
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(stem_kernel(model), before)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.once
def test_code_in_a_file_is_not_run(resnet8, tmp_path):
    for content in ({"model": resnet8, "x": Trap(tmp_path / "ran")}, torch.nn.Linear(2, 2)):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(InputError, match="Code in a file is never run") as error:
            models.load_torch_weights(create(), tmp_path / "x.pth")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "x.pth", weights_only=False)  # the trap is one
    torch.save(Trap(tmp_path / "ran"), tmp_path / "x.pth")
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.once
def test_damaged_files_are_refused(resnet8, tmp_path):
    torch.save(resnet8, tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    value = resnet8["conv1.weight"].numpy().tobytes()
    flipped = content.replace(value, value[:100] + bytes([value[100] ^ 1]) + value[101:])
    assert flipped != content
    for damaged in (flipped, content[: len(content) // 2], b"no checkpoint" * 100, b"hello\n", b""):
        (tmp_path / "x.pth").write_bytes(damaged)
        with pytest.raises(InputError, match=r"^path: .*x\.pth' is .*damaged") as error:
            models.load_torch_weights(create(), tmp_path / "x.pth")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^path: there is no file"):
        models.load_torch_weights(create(), tmp_path / "absent.pth")


@pytest.mark.once
def test_a_model_of_ones_own_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="mine")
    with pytest.raises(InputError, match=r"^model: 'mine' is not a model of the zoo"):
        models.load_torch_weights(model, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"^model: 'resnet8' is not a model of the zoo"):
        models.load_torch_weights("resnet8", tmp_path / "x.pth")
    torch.save({}, tmp_path / "x.pth")
    wrapped = keras.Sequential([keras.Input((32, 32, 3)), create()], name="resnet8")
    with pytest.raises(InputError, match=r"^model: 'resnet8' has a layer 'resnet8', which"):
        models.load_torch_weights(wrapped, tmp_path / "x.pth")


@pytest.mark.once
def test_pytorch_is_asked_for_where_it_is_absent(tmp_path, monkeypatch):
    (tmp_path / "x.pth").touch()
    model = create()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"^path: the package torch .*'dskd-keras\[torch\]'$"):
        models.load_torch_weights(model, tmp_path / "x.pth")
