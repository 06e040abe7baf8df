"""What `export` writes gives the model's logits elsewhere; what does not is never kept."""

import logging
import os
import shutil
import sys
import warnings

import keras
import numpy as np
import pytest
import small

from dskd_keras import export, models
from dskd_keras.errors import InputError

BACKEND = keras.backend.backend()
# What each backend can export to, and the packages that pip has to bring for it.
PACKAGES = {
    "tensorflow": {
        "onnx": ("onnx", "onnxruntime", "tf2onnx"),
        "saved_model": (),
        "litert": ("ai_edge_litert",),
    },
    "jax": {"saved_model": ("tensorflow",)},
    "torch": {"onnx": ("onnx", "onnxruntime")},
}[BACKEND]
# The format that is written first where one suffices; the quickest.
FORMAT = {"tensorflow": "saved_model", "jax": "saved_model", "torch": "onnx"}[BACKEND]


def require(format):
    for package in PACKAGES[format]:
        pytest.importorskip(package)


def randomized(model):
    """Gives normalisations and biases values that matter: fresh ones are 0 and 1."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) == 1:
            weight.assign(rng.uniform(0.5, 2.0, weight.shape))
    return model


def convnet(name="student"):
    return randomized(small.convnet(name))


def difference(format, path, model, x):
    """Largest difference of a logit, by a runtime that this test calls itself."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        logits = session.run(None, {session.get_inputs()[0].name: x})[0]
    elif format == "saved_model":
        import tensorflow as tf

        loaded = tf.saved_model.load(str(path))
        (logits,) = loaded.signatures["serving_default"](tf.constant(x)).values()
    else:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path))
        runner = interpreter.get_signature_runner()
        (name,) = runner.get_input_details()
        (logits,) = runner(**{name: x}).values()
    return np.abs(np.asarray(logits) - model.predict(x, verbose=0)).max()


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, images, and the file that `export` made of the model."""
    require(FORMAT)
    model, (x, _) = convnet(), small.images(8)
    folder = tmp_path_factory.mktemp("exported")
    path, measured = export.export(model, FORMAT, folder / f"x{export.SUFFIXES[FORMAT]}", x)
    assert path == folder / f"x{export.SUFFIXES[FORMAT]}" and left_in(folder) == [path.name]
    assert measured <= 1e-5
    return model, x, path


@pytest.mark.parametrize("format", PACKAGES)
def test_exported_logits_are_those_of_the_model_for_batches_of_any_size(format, tmp_path, capfd):
    """Here with what converters get wrong.

    Grouped convolutions, a normalisation with a given mean, and a model inside the model.
    """
    require(format)
    inputs = keras.Input((8, 8, 4), name="images")
    x = keras.layers.Conv2D(8, 3, groups=2, padding="same", strides=2)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.DepthwiseConv2D(3, padding="same")(x)
    x = keras.layers.MaxPooling2D(2)(x)
    shuffled = keras.layers.Permute((1, 2, 4, 3))(keras.layers.Reshape((2, 2, 2, 4))(x))
    x = keras.layers.Concatenate()([x, keras.layers.Reshape((2, 2, 8))(shuffled)])
    x = keras.layers.GlobalAveragePooling2D()(x)
    student = randomized(keras.Model(inputs, keras.layers.Dense(3, name="logits")(x)))
    scale = keras.layers.Normalization(mean=[120.0, 110.0, 100.0, 90.0], variance=[3600.0] * 4)
    pixels = keras.Input((8, 8, 4), name="pixels")
    model = keras.Model(pixels, student(scale(pixels)))
    images = np.random.default_rng(0).uniform(0, 255, (6, 8, 8, 4)).astype("float32")
    mean = scale.mean
    target = tmp_path / f"x{export.SUFFIXES[format]}"
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        path, measured = export.export(model, format, target, images)
    assert caught == [] and capfd.readouterr() == ("", "")
    assert path == target and measured <= 1e-5
    for batch in (images[:1], images[:5], images):
        assert difference(format, path, model, batch) < 1e-5
    assert left_in(tmp_path) == [path.name]
    # The model itself is as it was, and trains on.
    assert scale.mean is mean and len(model.get_layer(student.name)._inbound_nodes) == 1
    assert "convolution_op" not in vars(student.layers[1])
    with small.eagerly():
        model.compile("sgd", loss=small.crossentropy())
        model.train_on_batch(images, np.zeros(6, "int32"))


def test_exported_logits_of_a_plain_model(exported):
    model, x, path = exported
    for batch in (x[:1], x[:5], x):
        assert difference(FORMAT, path, model, batch) < 1e-5


@pytest.mark.parametrize("format", PACKAGES)
def test_student_of_the_zoo_with_channels_first(format, tmp_path):
    require(format)
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        if (format, BACKEND) == ("saved_model", "tensorflow"):
            with pytest.raises(InputError, match="channels_last; onnx and litert take"):
                export.check_available(format)
            return
        model = randomized(models.create("resnet8", 10, (3, 16, 16)))
        x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype("float32")
        _, measured = export.export(model, format, tmp_path / "x", x)
        assert measured < 1e-5
    finally:
        keras.config.set_image_data_format(before)


def copy(source, target):
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)


@pytest.fixture
def converted(exported, monkeypatch):
    """The model, images and file of `exported`, which every conversion is now a copy of."""
    model, x, file = exported
    monkeypatch.setattr(export, "_convert", lambda model, format, path: copy(file, path))
    return model, x, file


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_other_weights_in_the_file_are_noticed_and_the_old_file_stays(factor, converted, tmp_path):
    model, x, file = converted
    copy(file, tmp_path / "x")
    kernel = model.get_layer("stage1_conv").kernel
    values = keras.ops.convert_to_numpy(kernel).copy()
    message = r"student gives other logits .* differ by (0\.0|nan)"
    try:
        kernel.assign(values * factor)
        with pytest.raises(export.ExportError, match=message) as error:
            export.export(model, FORMAT, tmp_path / "x", x)
    finally:
        kernel.assign(values)
    assert "\n" not in str(error.value)
    assert difference(FORMAT, tmp_path / "x", model, x) < 1e-5
    assert left_in(tmp_path) == ["x"]


def test_other_epsilon_of_the_normalisations_is_noticed(converted, tmp_path):
    """A mistake that converters make, small enough to keep most predictions."""
    model, x, _ = converted
    other = small.convnet("student")
    other.set_weights(model.get_weights())
    other.get_layer("stage2_bn").epsilon *= 2
    with pytest.raises(export.ExportError, match="gives other logits"):
        export.export(other, FORMAT, tmp_path / "x", x)
    assert left_in(tmp_path) == []


def test_damaged_file_is_noticed(exported, tmp_path, monkeypatch):
    model, x, file = exported

    def truncate(model, format, path):
        copy(file, path)
        for part in [path] if path.is_file() else path.rglob("*.pb"):
            os.truncate(part, part.stat().st_size // 2)

    monkeypatch.setattr(export, "_convert", truncate)
    with pytest.raises(export.ExportError, match="what came out can't be run") as error:
        export.export(model, FORMAT, tmp_path / "x", x)
    assert "\n" not in str(error.value)
    assert left_in(tmp_path) == []


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    require(FORMAT)
    model, (x, _) = convnet(), small.images(8)

    def fail(path, **_):
        path.write_bytes(b"half")
        raise ValueError("\nno such operation\nand where")

    monkeypatch.setattr(model, "export", fail)
    with pytest.raises(export.ExportError) as error:
        export.export(model, FORMAT, tmp_path / "deep" / "x", x)
    assert str(error.value) == (
        f"export: student can't be converted to {FORMAT!r}: no such operation and where"
    )
    assert left_in(tmp_path / "deep") == []


def test_interrupt_leaves_nothing_and_the_output_as_it_was(tmp_path, monkeypatch, capfd):
    require(FORMAT)
    model, (x, _) = convnet(), small.images(8)

    def interrupt(path, **_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export.export(model, FORMAT, tmp_path / "x", x)
    assert left_in(tmp_path) == []
    print("here again")
    os.write(2, b"here too")
    assert capfd.readouterr() == ("here again\n", "here too")
    assert logging.root.manager.disable == 0


def test_whole_file_replaces_the_old_one(converted, tmp_path):
    model, x, file = converted
    old = tmp_path / "x"
    if file.is_dir():
        old.mkdir()
        old = old / "old"
    old.write_bytes(b"old")
    path, _ = export.export(model, FORMAT, tmp_path / "x", x)
    assert difference(FORMAT, path, model, x) < 1e-5
    assert left_in(tmp_path) == ["x"] and not (tmp_path / "x" / "old").exists()


def test_another_process_keeps_its_folder_and_leftovers_go_when_asked(
    exported, tmp_path, monkeypatch
):
    model, x, file = exported
    # As `export` names them, one for a path with a longer name.
    for name in (".x.ab1_cd2e.exporting", ".x.y.ab1_cd2e.exporting", ".xy.ab1_cd2e.exporting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"half")
    before = left_in(tmp_path)
    seen = []

    def convert(model, format, path):
        seen.extend(left_in(tmp_path))
        copy(file, path)

    monkeypatch.setattr(export, "_convert", convert)
    export.export(model, FORMAT, tmp_path / "x", x)
    (own,) = set(seen) - set(before)
    assert own.startswith(".x.") and own.endswith(".exporting")
    assert left_in(tmp_path) == [*before, "x"]
    export.remove_leftovers(tmp_path / "x")
    assert left_in(tmp_path) == [*before[1:], "x"]
    (tmp_path / own).mkdir()
    export.remove_leftovers(tmp_path / "x")
    assert left_in(tmp_path) == [*before[1:], "x"]


@pytest.mark.parametrize(
    ("format", "package"), [(format, name) for format in PACKAGES for name in PACKAGES[format]]
)
def test_missing_package_is_named_before_anything_is_imported(
    format, package, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "_installed", lambda name: name != package)
    before = set(sys.modules)
    pip = package.replace("_", "-")
    with pytest.raises(InputError) as error:
        export.check_available(format)
    extra = "tensorflow" if package == "tensorflow" else "export"
    assert str(error.value) == (
        f"export: the package {pip} is not installed. Install it with: "
        f"pip install 'dskd-keras[{extra}]'"
    )
    assert set(sys.modules) == before
    with pytest.raises(InputError, match=pip):
        export.export(convnet(), format, tmp_path / "x", small.images(8)[0])
    assert left_in(tmp_path) == []


def test_package_that_is_not_installed_is_found_out():
    assert not export._installed("no_such_package_in_any_environment")
    assert export._installed("numpy")


def test_format_that_the_backend_lacks_names_one_that_has_it():
    for format in export.FORMATS:
        if format in PACKAGES:
            continue
        with pytest.raises(InputError) as error:
            export.check_available(format)
        message = str(error.value)
        assert message.startswith(f"export: {format!r} can't be written with the {BACKEND} backend")
        assert "KERAS_BACKEND=tensorflow" in message and "\n" not in message


def test_unknown_format():
    with pytest.raises(InputError, match=r"^export: 'onx' .* Did you mean 'onnx'\?"):
        export.check_available("onx")


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 8, 8, 2), "float32"),
        np.zeros((4, 8, 8, 2)),
        np.zeros((4, 8, 8, 3), "float32"),
        np.zeros((8, 8, 2), "float32"),
    ],
    ids=["one", "float64", "channels", "no batch"],
)
def test_images_that_the_model_does_not_take(images, tmp_path):
    require(FORMAT)
    with pytest.raises(InputError, match=r"images: .* float32 images of shape \(8, 8, 2\)"):
        export.export(convnet(), FORMAT, tmp_path / "x", images)
    assert left_in(tmp_path) == []


def test_models_that_are_not_exported(tmp_path):
    require(FORMAT)
    x, _ = small.images(4)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small.convnet("mixed")
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(InputError, match="export: mixed computes in bfloat16"):
        export.export(model, FORMAT, tmp_path / "x", x)
    two = keras.Model(model.inputs, [model.outputs[0]] * 2, name="two")
    with pytest.raises(InputError, match="export: two should have one input"):
        export.export(two, FORMAT, tmp_path / "x", x)
