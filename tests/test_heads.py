import hypothesis
import keras
import numpy as np
import pytest
import small
from hypothesis import strategies
from keras import layers

import dskd_keras
from dskd_keras import graph, heads, keras_internals


def image_map(x, width):
    return layers.Conv2D(width, 3, padding="same", data_format="channels_last")(x)


def strided_map(x, width):
    return layers.Conv2D(width, 3, strides=4, padding="same", data_format="channels_last")(x)


def odd_map(x, width):
    return layers.Conv2D(width, 4, strides=2, padding="valid", data_format="channels_last")(x)


def sequence(x, width):
    x = layers.Reshape((-1, x.shape[-1] * x.shape[2]))(x)
    return layers.Dense(width, activation="gelu")(x)


def vector(x, width):
    return layers.Dense(width)(layers.Flatten()(x))


SHAPE = (12, 12, 2)
KINDS = [image_map, strided_map, sequence, vector]
OF_THE_SAME_LAYERS = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="takes long to compile: layers of the first two again"
)


def classifier(name, kinds, width):
    """A layer of the kind's name for each kind of feature map, all of them pooled to logits."""
    inputs = keras.Input(SHAPE)
    pooled = []
    for kind in kinds:
        x = layers.Identity(name=kind.__name__)(kind(inputs, width))
        axes = tuple(range(1, len(x.shape) - 1))
        pooled.append(keras.ops.mean(x, axis=axes) if axes else x)
    logits = layers.Dense(small.CLASSES, name="logits")(keras.ops.concatenate(pooled, axis=-1))
    return keras.Model(inputs, logits, name=name)


@pytest.mark.parametrize(
    "of_teacher, projected",
    [
        # Of the kinds of the student's maps, in their order.
        (odd_map, [(5, 5, 5), (3, 3, 5), (5,), (5,)]),  # 12 to 6 by halving, to 5 by pooling
        (sequence, [(5,), (5,), (12, 5), (5,)]),
        pytest.param(image_map, [(12, 12, 5), (3, 3, 5), (5,), (5,)], marks=OF_THE_SAME_LAYERS),
        # The first is halved twice.
        pytest.param(strided_map, [(3, 3, 5), (3, 3, 5), (5,), (5,)], marks=OF_THE_SAME_LAYERS),
        pytest.param(vector, [(5,)] * 4, marks=OF_THE_SAME_LAYERS),
    ],
)
@small.eagerly()
def test_heads_fit_every_kind_of_feature_map(of_teacher, projected):
    names = [kind.__name__ for kind in KINDS]
    distiller = dskd_keras.Distiller(
        classifier("teacher", [of_teacher], 5),
        classifier("student", KINDS, 4),
        names,
        teacher_layer=of_teacher.__name__,
    )
    distiller.compile("sgd", loss=small.crossentropy())
    outputs = distiller(keras.Input(SHAPE), training=True)
    shapes = {name: (None, *shape) for name, shape in zip(names, projected, strict=True)}
    assert {name: x.shape for name, x in outputs.deep_features.items()} == shapes
    assert {x.shape for x in outputs.deep_logits.values()} == {(None, small.CLASSES)}
    # Every weight of the heads learns.
    heads_weights = [
        variable
        for layer in distiller.student_with_heads.layers
        if layer.name.startswith("head_")
        for variable in layer.trainable_variables
    ]
    before = small.values(heads_weights)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, *SHAPE)).astype("float32"), np.arange(4) % small.CLASSES
    for _ in range(2):
        logs = distiller.train_on_batch(x, y, return_dict=True)
        assert all(np.isfinite(float(value)) for value in logs.values())
    for variable, a, b in zip(heads_weights, before, small.values(heads_weights), strict=True):
        # A bias before batch norm would be the exception; heads have none.
        assert (a != b).any(), variable.path


@pytest.mark.parametrize("head", heads.names())
@small.eagerly()
def test_every_head_brings_every_kind_of_map_to_the_teachers(head):
    names = [kind.__name__ for kind in KINDS]
    distiller = dskd_keras.Distiller(
        classifier("teacher", [odd_map], 5),
        classifier("student", KINDS, 4),
        names,
        teacher_layer="odd_map",
        head=head,
    )
    distiller.compile("sgd", loss=small.crossentropy())
    outputs = distiller(keras.Input(SHAPE), training=True)
    shapes = dict(zip(names, [(5, 5, 5), (3, 3, 5), (5,), (5,)], strict=True))
    assert {name: x.shape[1:] for name, x in outputs.deep_features.items()} == shapes
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, *SHAPE)).astype("float32"), np.arange(4) % small.CLASSES
    logs = distiller.train_on_batch(x, y, return_dict=True)
    assert all(np.isfinite(float(value)) for value in logs.values())
    assert type(heads.get(keras.saving.serialize_keras_object(heads.get(head)))) is type(
        heads.get(head)
    )


@pytest.mark.parametrize("head", heads.names())
@small.eagerly()
def test_no_head_sees_padding(head):
    inputs = keras.Input((None, 2))
    x = layers.Masking(name="stage1")(inputs)
    student = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    model = heads.attach(student, ["stage1"], [(None, 4)], head=heads.get(head))
    short = np.random.default_rng(0).standard_normal((2, 4, 2)).astype("float32")
    padded = np.pad(short, [(0, 0), (0, 3), (0, 0)])
    for training in (False, True):
        of_short, of_padded = (model(x, training=training) for x in (short, padded))
        for part in ("deep_logits", "deep_features"):
            expected, found = (
                keras.ops.convert_to_numpy(getattr(outputs, part)["stage1"])
                for outputs in (of_short, of_padded)
            )
            if part == "deep_features":
                found = found[:, :4]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_channels_first_maps_give_the_numbers_of_channels_last_ones():
    def net(name, data_format):
        first = data_format == "channels_first"
        inputs = keras.Input((2, 8, 8) if first else (8, 8, 2))
        x = layers.Conv2D(
            4, 3, padding="same", data_format=data_format, kernel_initializer=_ramp(), name="conv"
        )(inputs)
        x = layers.ReLU(name="stage1")(x)
        x = layers.GlobalAveragePooling2D(data_format=data_format)(x)
        x = layers.Dense(small.CLASSES, kernel_initializer=_ramp())(x)
        return keras.Model(inputs, x, name=name)

    x, y = small.images(4)
    losses = []
    for data_format in ("channels_last", "channels_first"):
        keras.utils.set_random_seed(0)
        distiller = dskd_keras.Distiller(
            net("teacher", data_format), net("student", data_format), ["stage1"]
        )
        distiller.compile(
            "sgd", loss=small.crossentropy(), jit_compile=small.jit_compile(data_format)
        )
        images = x if data_format == "channels_last" else x.transpose(0, 3, 1, 2)
        losses.append(distiller.train_on_batch(images, y, return_dict=True))
        outputs = distiller(keras.Input(images.shape[1:]), training=True)
        assert tuple(outputs.deep_features["stage1"].shape) == (None, 8, 8, 4)
    for name in losses[0]:
        assert float(losses[1][name]) == pytest.approx(float(losses[0][name]), rel=1e-4)


def _ramp():
    def initializer(shape, dtype=None):
        values = np.sin(np.arange(np.prod(shape), dtype="float32")).reshape(shape)
        return keras.ops.convert_to_tensor(values, dtype=dtype)

    return initializer


def nested(name, sequential=False):
    backbone = small.convnet(f"{name}_backbone")
    backbone = keras.Model(backbone.inputs[0], backbone.get_layer("stage2").output, name="backbone")
    parts = [
        layers.GlobalAveragePooling2D(data_format="channels_last", name="pool"),
        layers.Dense(small.CLASSES, name="logits"),
    ]
    if sequential:
        return keras.Sequential([keras.Input((8, 8, 2)), backbone, *parts], name=name)
    inputs = x = keras.Input((8, 8, 2))
    for layer in [backbone, *parts]:
        x = layer(x)
    return keras.Model(inputs, x, name=name)


@pytest.mark.parametrize("sequential", [False, True])
@small.eagerly()
def test_layers_of_nested_models_are_reached_by_path(sequential, tmp_path):
    teacher, student = nested("teacher", sequential), nested("student", sequential)
    distiller = dskd_keras.Distiller(
        teacher, student, ["backbone/stage1", "backbone"], teacher_layer="backbone/stage2"
    )
    distiller.compile("sgd", loss=small.crossentropy())
    x, y = small.images(4)
    # The taps see what the nested model computes, and its weights are the student's own.
    inner = student.get_layer("backbone")
    expected = keras.Model(inner.inputs[0], inner.get_layer("stage1").output)(x, training=False)
    opened, (tapped,), _ = graph.tap("student_layers", student, ["backbone/stage1"])
    taps = keras.Model(keras_internals.input_structure(opened), tapped)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(taps(x, training=False)),
        keras.ops.convert_to_numpy(expected),
        rtol=1e-6,
    )
    before = small.values(inner.trainable_variables)
    logs = distiller.train_on_batch(x, y, return_dict=True)
    assert "deep_prediction_loss/backbone/stage1" in logs
    after = small.values(inner.trainable_variables)
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
    student.save(tmp_path / "student.keras")
    loaded = keras.models.load_model(tmp_path / "student.keras")
    np.testing.assert_array_equal(
        *(keras.ops.convert_to_numpy(model(x)) for model in (loaded, distiller))
    )


def test_the_default_teacher_layer_is_the_last_map_before_pooling():
    def name(model):
        return graph.default_teacher_layer(model)

    assert name(small.convnet("a")) == "stage2"
    assert name(nested("b")) == "backbone"
    # A 1×1 map after the pooling is no feature map any more, nor is a flattened one.
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, name="features", data_format="channels_last")(inputs)
    x = layers.GlobalAveragePooling2D(keepdims=True, data_format="channels_last")(x)
    x = layers.Conv2D(3, 1, data_format="channels_last")(x)
    assert name(keras.Model(inputs, layers.Flatten()(x))) == "features"
    # Without any map it is what the last layer reads.
    inputs = keras.Input((7,))
    x = layers.Dense(5, name="penultimate")(layers.Dense(6)(inputs))
    assert name(keras.Model(inputs, layers.Dense(3)(x))) == "penultimate"


def test_layers_without_a_usable_map_are_refused():
    tokens = keras.Input((8,), dtype="int32", name="tokens")
    shared = layers.Dense(2, name="shared")
    sequence = layers.Embedding(9, 2, name="embed")(layers.Identity(name="ids")(tokens))
    x = layers.GlobalAveragePooling1D()(shared(shared(sequence)))
    student = keras.Model(tokens, layers.Dense(3)(x), name="student")
    for layer, reason in {
        "tokens": "it is the input",
        "shared": "'shared' is called 2 times: name 'shared#0' or 'shared#1'",
        "ids": "it gives int32 (None, 8)",
    }.items():
        with pytest.raises(dskd_keras.InputError) as error:
            heads.attach(student, [layer], [(4, 8)])
        assert str(error.value).startswith("student_layers: ")
        assert reason in str(error.value) and "\n" not in str(error.value)
    heads.attach(student, ["shared#0", "shared#1"], [(4, 8)] * 2)


@pytest.mark.once
def test_default_heads_are_small():
    student = dskd_keras.models.create("resnet32", 100, (32, 32, 3))
    with_heads = heads.attach(student, ["stage1", "stage2"], [(8, 8, 64)] * 2)
    # The heads are training's alone, but a step pays for them.
    assert with_heads.count_params() < 1.07 * student.count_params()


SIZES = strategies.one_of(strategies.none(), strategies.integers(1, 9))
MAPS = strategies.tuples(
    strategies.lists(SIZES, max_size=3).map(tuple), strategies.integers(1, 5)
).map(lambda shape: (*shape[0], shape[1]))


@pytest.mark.once
@hypothesis.given(own=MAPS, of_teacher=MAPS, dense=strategies.booleans())
@hypothesis.settings(deadline=None, derandomize=True, max_examples=40)
def test_any_two_maps_get_a_head_or_an_error_that_names_both(own, of_teacher, dense):
    inputs = keras.Input(own)
    x = layers.Dense(4, name="stage1")(inputs)
    axes = tuple(range(1, len(x.shape) - 1))
    pooled = x if dense or not axes else keras.ops.mean(x, axis=axes)
    student = keras.Model(inputs, layers.Dense(3)(pooled), name="student")
    logits = student.outputs[0].shape
    try:
        outputs = heads.attach(student, ["stage1"], [of_teacher]).output
    except dskd_keras.InputError as error:
        assert dense and len(own) != len(of_teacher)  # a vector has no logits at positions
        assert "'stage1'" in str(error) and str(tuple(logits)) in str(error)
        return
    projected = outputs.deep_features["stage1"].shape
    assert projected[-1] == of_teacher[-1]
    assert len(projected) == (len(own) + 1 if len(own) == len(of_teacher) else 2)
    known = None not in (*own, *of_teacher)
    if known and len(own) == len(of_teacher):
        # The loss pools the larger one, which is never the student's.
        assert all(a <= b for a, b in zip(projected[1:-1], of_teacher[:-1], strict=True))
    assert len(outputs.deep_logits["stage1"].shape) == len(logits)
