import keras
import numpy as np
import pytest
from keras import layers, ops

from dskd_keras import InputError, graph
from dskd_keras.keras_internals import input_structure, output_structure


class Computed(layers.Layer):
    """A function as a layer, with its dtype."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


class Split(layers.Layer):
    """The halves of a vector, as a tuple."""

    def call(self, x):
        half = x.shape[-1] // 2
        return x[:, :half], x[:, half:]


class Named(layers.Layer):
    """Two outputs in nested dicts."""

    def call(self, x):
        return {"sum": x + 1.0, "of": {"twice": 2.0 * x}}


class Subclassed(keras.Model):
    """A model whose layers can't be seen, with a dict of outputs."""

    def __init__(self, several=True, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4)
        self.several = several
        self.outputs = [self.dense]  # a functional model's are tensors

    def call(self, x):
        x = self.dense(x)
        return {"hidden": x, "pooled": 2.0 * x} if self.several else x


def dense(width=4, name=None):
    return layers.Dense(width, name=name)


def model_of(call, shape=(4,), name="model", **options):
    """A functional model of what a function makes of its input."""
    inputs = keras.Input(shape, name="images", **options)
    return keras.Model(inputs, call(inputs), name=name)


def data(shape=(4,), count=2):
    return np.random.default_rng(0).standard_normal((count, *shape)).astype("float32")


def run(model, tensors, x):
    """What symbolic tensors of a model's graph are for an input."""
    outputs = dict(enumerate(tensors))
    values = keras.Model(input_structure(model), outputs)(x, training=False)
    return [ops.convert_to_numpy(values[number]) for number in outputs]


def tapped(model, *names, x):
    """The values of named layers."""
    found = graph.tap("student_layers", model, names)
    return run(found.model, found.tensors, x)


def assert_close(values, expected):
    for pair in zip(values, expected, strict=True):
        np.testing.assert_allclose(*map(ops.convert_to_numpy, pair), rtol=1e-5, atol=1e-6)


# Names.


def many_named():
    shared = dense(name="shared")
    both = dense(name="both")
    inner = model_of(lambda x: [dense(name="in")(x), x * 2.0], name="inner")

    def call(x):
        a = shared(x)
        b = shared(a)
        left, right = Split(name="split")(b)
        named = Named(name="named")(ops.concatenate([left, right], axis=-1))
        first, second = inner(named["sum"])
        third, _ = inner(named["of"]["twice"])
        x = both(both(first) + second)
        return dense(3, name="logits")(x + third)

    return model_of(call)


def plain(names):
    """Those of layers: an operation is called otherwise each time that it is used."""
    last = [name.rpartition("/")[2] for name in names]
    return [
        name
        for name, inner in zip(names, last, strict=True)
        if not inner.startswith(("add", "concatenate", "multiply"))
    ]


def test_calls_and_outputs_have_names():
    model = many_named()
    assert plain(graph.layer_names(model)) == [
        "shared#0", "shared#1", "split:0", "split:1", "named:of.twice", "named:sum",
        "inner#0:0", "inner#0:1", "inner#0/in", "inner#1:0", "inner#1:1", "inner#1/in",
        "both#0", "both#1", "logits",
    ]  # fmt: skip
    x = data()
    shared, both = model.get_layer("shared"), model.get_layer("both")
    inside = model.get_layer("inner").get_layer("in")
    b = shared(shared(x))
    first, third = inside(b + 1.0), inside(2.0 * b)
    expected = {
        "shared#0": shared(x), "shared#1": b, "split:0": b[:, :2], "split:1": b[:, 2:],
        "named:of.twice": 2.0 * b, "named:sum": b + 1.0, "inner#0:0": first,
        "inner#0:1": 2.0 * (b + 1.0), "inner#0/in": first, "inner#1:0": third,
        "inner#1:1": 4.0 * b, "inner#1/in": third, "both#0": both(first),
        "both#1": both(both(first) + 2.0 * (b + 1.0)), "logits": model(x),
    }  # fmt: skip
    assert_close(tapped(model, *expected, x=x), expected.values())
    # In any order, and those of the model itself alone.
    assert_close(tapped(model, "split:1", "shared#0", x=x), [b[:, 2:], shared(x)])


def test_a_nested_model_may_be_called_twice_at_every_level():
    core = model_of(lambda x: dense(name="last")(ops.tanh(dense(name="first")(x))), name="core")
    outer = model_of(lambda x: core(core(x)), name="outer")
    model = model_of(lambda x: outer(x) + outer(2.0 * x))
    x = data()
    first = core.get_layer("first")
    expected = {
        "outer#0/core#0/first": first(x),
        "outer#0/core#1/last": outer(x),
        "outer#1/core#0/last": core(2.0 * x),
        "outer#1/core#1/first": first(core(2.0 * x)),
        "outer#1": outer(2.0 * x),
        "outer#0/core#0": core(x),
    }
    found = graph.tap("student_layers", model, list(expected))
    assert_close(tapped(model, *expected, x=x), expected.values())
    assert_close([found.model(x)], [model(x)])
    assert {id(v) for v in found.model.variables} == {id(v) for v in model.variables}


def test_only_a_name_in_a_nested_model_opens_it():
    inner = model_of(lambda x: {"a": dense(name="a")(x), "b": dense(name="b")(x)}, name="inner")

    def call(x):
        outputs = inner(x)
        return {"scores": [dense(3, name="one")(outputs["a"])], "aside": dense(name="two")(x)}

    model = model_of(call)
    assert graph.tap("student_layers", model, ["inner:a", "one", "two"]).model is model
    assert graph.tap("student_layers", model, []).model is model
    opened = graph.tap("student_layers", model, ["inner/b", "two"]).model
    assert opened is not model
    x = data()
    keras.tree.assert_same_structure(output_structure(opened), output_structure(model))
    values, expected = opened(x), model(x)
    assert_close([values["scores"][0], values["aside"]], [expected["scores"][0], expected["aside"]])
    # What only leads to another output than the first has a name, too.
    assert_close(tapped(model, "two", "inner/b", x=x), [
        expected["aside"], inner(x)["b"]
    ])  # fmt: skip


def test_inputs_of_nested_models_are_what_was_passed():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    inner = keras.Model([left, right], dense(name="in")(left - right), name="inner")
    inputs = keras.Input((4,))
    # Keras pairs a dict with the inputs' names, whatever its order.
    passed = {"right": layers.Dense(4, name="r")(inputs), "left": layers.Dense(4, name="l")(inputs)}
    model = keras.Model(inputs, dense(3)(inner(passed)))
    x = data()
    expected = model.get_layer("l")(x) - model.get_layer("r")(x)
    assert_close(tapped(model, "inner/in", x=x), [inner.get_layer("in")(expected)])
    assert graph.default_teacher_layer(model) == "inner"


def test_an_exact_name_wins():
    def call(x):
        shared = dense(name="a")
        x = dense(name="a#0")(shared(shared(x)))
        left, _ = Split(name="s")(x)
        return dense(name="s:0")(left)

    model = model_of(call)
    assert graph.layer_names(model) == ["a#1", "a#0", "s:1", "s:0"]
    x = data()
    a = model.get_layer("a")
    expected = model.get_layer("a#0")(a(a(x)))
    assert_close(tapped(model, "a#0", "s:0", x=x), [expected, model(x)])


def opaque(several=True):
    def call(x):
        x = Subclassed(several, name="sub")(x)
        return dense(3, name="logits")(x["pooled"] if several else x)

    return model_of(call)


MISTAKES = {
    "shared": "student_layers: 'shared' is called 2 times: name 'shared#0' or 'shared#1'.",
    "split": "student_layers: 'split' gives 2 outputs: name 'split:0' or 'split:1'.",
    "inner": "student_layers: 'inner' is called 2 times and gives 2 outputs: name 'inner#0:0', "
    "'inner#0:1', 'inner#1:0' or 'inner#1:1'.",
    "inner#0": "student_layers: 'inner' gives 2 outputs: name 'inner#0:0' or 'inner#0:1'.",
    "inner:1": "student_layers: 'inner' is called 2 times: name 'inner#0:1' or 'inner#1:1'.",
    "inner/in": "student_layers: 'inner' is called 2 times: name 'inner#0/in' or 'inner#1/in'.",
    "shered#1": "student_layers: 'shered#1' should be a known name. Did you mean 'shared#1'",
    "shared#2": "student_layers: 'shared#2' should be a known name. Did you mean 'shared#",
    "split:left": "student_layers: 'split:left' should be a known name. Did you mean 'split:1'",
    "inner#0/inn": "student_layers: 'inner#0/inn' should be a known name. Did you mean ",
    "images": "student_layers: layer 'images' has no usable feature map: it is the input.",
    "logits/kernel": "student_layers: 'logits/kernel' reaches into 'logits', a Dense layer, which "
    "has no graph of layers. Name 'logits' instead.",
    7: "student_layers: 7 should be the name of a layer.",
}


@pytest.mark.once
def test_mistakes_in_names_are_answered_with_the_names_to_choose_from():
    model = many_named()
    for name, message in MISTAKES.items():
        with pytest.raises(InputError) as error:
            graph.tap("student_layers", model, [name])
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    layer = layers.Activation("relu", name="conv1")
    for take in (graph.tap, graph.check_names):
        with pytest.raises(InputError) as error:
            take("teacher_layer", model, [layer])
        expected = "teacher_layer: an Activation layer, where its name, 'conv1', is expected."
        assert str(error.value) == expected


@pytest.mark.parametrize("several", [False, True])
def test_a_subclassed_model_is_one_layer(several):
    model = opaque(several)
    names = ["sub:hidden", "sub:pooled"] if several else ["sub"]
    assert graph.layer_names(model) == [*names, "logits"]
    x = data()
    values = model.get_layer("sub")(x)
    expected = [values["hidden"], values["pooled"]] if several else [values]
    assert_close(tapped(model, *names, x=x), expected)
    with pytest.raises(InputError) as error:
        graph.tap("student_layers", model, ["sub/dense"])
    choices = " or ".join(map(repr, names))
    assert str(error.value) == (
        "student_layers: 'sub/dense' reaches into 'sub', a Subclassed layer, which has no graph of "
        f"layers. Name {choices} instead."
    )
    assert graph.default_teacher_layer(model) == names[-1]
    graph.check_graph("student", model)


def test_operations_have_names():
    model = model_of(lambda x: dense(3)(ops.relu(dense(name="hidden")(x))))
    (relu,) = (name for name in graph.layer_names(model) if name.startswith("relu"))
    x = data()
    assert_close(tapped(model, relu, x=x), [ops.relu(model.get_layer("hidden")(x))])
    assert graph.default_teacher_layer(model) == relu


# Feature maps.


@pytest.mark.parametrize(
    ("shape", "layer", "moved"),
    [
        ((5,), layers.Dense(3), (3,)),
        ((6, 5), layers.Dense(3), (6, 3)),
        ((None, 5), layers.Conv1D(3, 3), (None, 3)),
        ((5, 6), layers.Conv1D(3, 1, data_format="channels_first"), (6, 3)),
        ((None, None, 5), layers.Conv2D(3, 3, data_format="channels_last"), (None, None, 3)),
        ((5, None, 6), layers.Conv2D(3, 1, data_format="channels_first"), (None, 6, 3)),
        ((4, 6, 7, 5), layers.Conv3D(3, 1, data_format="channels_last"), (4, 6, 7, 3)),
        ((5, 4, 6, 7), layers.Conv3D(3, 1, data_format="channels_first"), (4, 6, 7, 3)),
    ],
)
def test_maps_of_every_kind_are_brought_to_channels_last(shape, layer, moved):
    # The layer behind an activation, which has no layout, and inside of a nested model.
    inner = model_of(lambda x: layers.ReLU(name="relu")(layer(x)), shape, name="inner")
    model = model_of(lambda x: ops.sum(inner(x), axis=range(1, len(shape))), shape)
    for name in ("inner", "inner/relu"):
        (tensor,) = graph.tap("teacher_layer", model, [name]).tensors
        assert graph.channels_last(tensor).shape == (None, *moved)


@pytest.mark.once
def test_transposed_maps_and_values():
    inputs = keras.Input((2, 3, 4))
    x = layers.Permute((2, 3, 1), name="moved")(
        layers.Conv2D(5, 1, data_format="channels_first", name="first")(inputs)
    )
    model = keras.Model(inputs, layers.ReLU(name="last")(x))
    found = graph.tap("teacher_layer", model, ["first", "moved", "last"])
    maps = [graph.channels_last(tensor) for tensor in found.tensors]
    assert maps[1] is found.tensors[1] and maps[2] is found.tensors[2]
    first, moved, _ = run(model, maps, data((2, 3, 4)))
    np.testing.assert_array_equal(first, moved)


@pytest.mark.once
def test_what_is_no_feature_map_is_refused():
    inputs = keras.Input((None, 6))
    x = layers.Dense(6, name="dense")(inputs)
    whole = Computed(lambda x: ops.cast(x, "int32"), name="whole")(x)
    scalar = Computed(lambda x: ops.sum(x, axis=(1, 2)), name="scalar")(x)
    swapped = layers.Permute((2, 1), name="swapped")(x)
    deep = layers.Reshape((-1, 1, 1, 2, 3), name="deep")(x)
    model = keras.Model(inputs, [whole, scalar, swapped, deep])
    gives = {
        "whole": "int32 (None, None, 6)",
        "scalar": "float32 (None,)",
        "swapped": "float32 (None, 6, None)",
        "deep": "float32 (None, None, 1, 1, 2, 3)",
    }
    for name, shape in gives.items():
        with pytest.raises(InputError) as error:
            graph.tap("teacher_layer", model, [name])
        assert str(error.value) == (
            f"teacher_layer: layer '{name}' has no usable feature map: it gives {shape}, where "
            "floats [B, D], [B, T, D], [B, H, W, C] or [B, D, H, W, C], or channels first, are "
            "expected, with a fixed number of channels."
        )


# Masks.

TOKENS = np.array([[5, 3, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0]])


def tokens(length=6, name="tokens"):
    return keras.Input((length,), dtype="int32", name=name)


def embedding(mask_zero=True, name=None):
    return layers.Embedding(9, 4, mask_zero=mask_zero, name=name)


def assert_masks_padding(model, masks):
    """Fails unless all masks say where tokens are, computed with the model."""
    assert None not in masks
    for mask in run(model, masks, TOKENS):
        np.testing.assert_array_equal(mask, TOKENS != 0)


@pytest.mark.parametrize("length", [6, None])
def test_masks_are_found_behind_what_loses_them(length):
    inputs = tokens(length)
    x = embedding(name="embed")(inputs) + embedding(mask_zero=False)(inputs)
    x = layers.Conv1D(4, 3, padding="same", name="same")(x)
    lost = layers.Conv1D(4, 3, name="valid")(x)
    pooled = layers.GlobalAveragePooling1D(name="pool")(lost)
    per_token = layers.Dense(3, name="logits")(x)
    model = keras.Model(inputs, [per_token, pooled])
    names = ["embed", "same", "logits", "valid", "pool"]
    found = graph.tap("student_layers", model, names)
    assert found.model is model
    assert_masks_padding(model, [*found.masks[:3], graph.mask_of(model.outputs[0])])
    # Where the positions are others, also where their number is not known, there is none.
    assert found.masks[3:] == [None, None]


def test_the_nearest_mask_counts():
    inputs = tokens()
    first = embedding(name="first")(inputs)
    second = layers.Masking(name="second")(first)
    model = keras.Model(inputs, layers.Dense(3, name="dense")(second + 1.0))
    a, b, c = graph.tap("student_layers", model, ["first", "second", "dense"]).masks
    assert a is not b and b is c


def encoder(length=6, own=True):
    """An encoder of tokens with an embedding, or of an embedding that is not its own."""
    inputs = tokens(length) if own else keras.Input((length, 4))
    x = embedding(name="embed")(inputs) if own else layers.Dense(4, name="first")(inputs)
    x = layers.Conv1D(4, 3, padding="same", name="conv")(x + 1.0)
    return keras.Model(inputs, layers.Dense(4, name="last")(x), name="encoder")


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.filterwarnings("ignore:Layer 'encoder'.*was passed an input with a mask")
def test_masks_go_into_nested_models_and_out_of_them(own):
    # The encoder knows less about the length than the model around it.
    nested = encoder(None, own)
    inputs = tokens()
    x = nested(inputs if own else embedding()(inputs))
    model = keras.Model(inputs, layers.Dense(3, name="logits")(x + 0.0))
    found = graph.tap("student_layers", model, ["encoder/conv", "encoder", "logits"])
    assert_masks_padding(found.model, [*found.masks, graph.mask_of(found.model.outputs[0])])
    # Dense logits alone open the model that has their mask.
    found = graph.tap("student_layers", model, [])
    assert (found.model is model) is not own
    assert_masks_padding(found.model, [graph.mask_of(found.model.outputs[0])])
    assert_close([found.model(TOKENS)], [model(TOKENS)])


@pytest.mark.once
def test_masks_of_nested_models_in_nested_models_and_of_two_calls():
    inner = encoder()
    inputs = tokens()
    outer = keras.Model(inputs, layers.Dense(4, name="top")(inner(inputs)), name="outer")
    inputs = tokens()
    model = keras.Model(inputs, outer(inputs) + outer(ops.flip(inputs, axis=1)))
    names = ["outer#0/encoder/conv", "outer#0/top", "outer#0", "outer#1/top"]
    found = graph.tap("student_layers", model, names)
    assert_masks_padding(found.model, found.masks[:3])
    (flipped,) = run(found.model, found.masks[3:], TOKENS)
    np.testing.assert_array_equal(flipped, TOKENS[:, ::-1] != 0)


# The default teacher layer.


def conv(width=4, size=3, name=None, strides=1):
    return layers.Conv2D(
        width, size, strides=strides, padding="same", name=name, data_format="channels_last"
    )


def pool(**options):
    return layers.GlobalAveragePooling2D(data_format="channels_last", **options)


def with_a_map(name, size=8):
    """A classifier of images whose last map is `features`."""

    def call(x):
        x = layers.ReLU(name="features")(conv(name="conv")(x))
        return layers.Dense(3, name="logits")(pool()(x))

    return model_of(call, (size, size, 2), name=name)


def behind_preprocessing(x):
    x = layers.ZeroPadding2D(2, data_format="channels_last")(x)
    x = layers.Normalization(mean=[0.1, 0.2], variance=[1.0, 2.0], axis=-1)(x)
    return with_a_map("big", 12)(layers.Rescaling(1 / 255)(x))


def shrunk(x):
    """Maps of one position at the end, after one with a border."""
    x = layers.ReLU(name="features")(conv(strides=4)(x))
    x = layers.ZeroPadding2D(1, name="border", data_format="channels_last")(x)
    x = layers.Conv2D(4, 4, data_format="channels_last")(x)
    gate = layers.Dense(4, activation="sigmoid")(layers.Reshape((1, 1, 4))(pool()(x)))
    return layers.Flatten()(layers.Conv2D(3, 1, data_format="channels_last")(x * gate))


def normalised(x):
    x = layers.Dense(3)(pool()(conv(name="features")(x)))
    return layers.Softmax()(layers.BatchNormalization()(x))


def segmented(x):
    x = conv(name="features")(conv(strides=2)(x))
    x = layers.UpSampling2D(2, data_format="channels_last")(x)
    return layers.Activation("linear")(conv(3, 1, name="logits")(x))


def token_classes(x):
    return layers.Dense(3)(layers.LayerNormalization(name="features")(layers.Dense(4)(x)))


def transformer(x):
    x = layers.Dense(4, name="patches")(layers.Reshape((16, 8))(x))
    x = layers.Add(name="sum")([x, layers.MultiHeadAttention(2, 2, name="attention")(x, x)])
    return layers.Dense(3)(layers.LayerNormalization(name="features")(x)[:, 0])


def two_kinds(x):
    """A map, and a vector from the same input which has none."""
    vector = layers.Dense(4)(pool()(x))
    x = pool()(conv(name="features")(x))
    return layers.Dense(3)(layers.Concatenate()([vector, x]))


def pooled_twice(x):
    x = conv(name="features")(x)
    largest = layers.GlobalMaxPooling2D(data_format="channels_last")(x)
    return layers.Dense(3)(layers.Concatenate()([pool()(x), largest]))


def called_twice(x):
    block = conv(2, name="block")
    return layers.Dense(3)(pool()(block(block(x))))


IMAGE = (8, 8, 2)
TEACHERS = [
    (behind_preprocessing, IMAGE, "big/features"),
    (shrunk, IMAGE, "features"),
    (normalised, IMAGE, "features"),
    (segmented, IMAGE, "features"),
    (token_classes, (5, 4), "features"),
    (transformer, IMAGE, "features"),
    (two_kinds, IMAGE, "features"),
    (pooled_twice, IMAGE, "features"),
    (pooled_twice, (None, None, 2), "features"),
    (called_twice, IMAGE, "block#1"),
    (lambda x: with_a_map("net")(x), IMAGE, "net/features"),
    (lambda x: layers.Dense(3)(layers.Dense(5, name="hidden")(x)), (7,), "hidden"),
    (lambda x: layers.Dense(3)(Split(name="split")(layers.Dense(6)(x))[1]), (7,), "split:1"),
    (lambda x: layers.Dense(3)(pool()(Mapped(name="own")(x)["map"])), IMAGE, "own:map"),
]


class Mapped(layers.Layer):
    """A custom layer with a kernel, which gives a map and something else."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4))

    def call(self, x):
        return {"map": ops.matmul(x, self.kernel), "count": ops.sum(x)}


@pytest.mark.once
@pytest.mark.parametrize(("call", "shape", "expected"), TEACHERS)
def test_the_default_teacher_layer(call, shape, expected):
    model = model_of(call, shape)
    name = graph.default_teacher_layer(model)
    assert name == expected
    assert graph.tap("teacher_layer", model, [name]).tensors


@pytest.mark.once
def test_each_output_has_its_own_default_teacher_layer():
    def call(x):
        x = conv(name="early")(x)
        early = layers.Dense(3)(pool()(x))
        late = layers.Dense(3)(pool()(conv(name="late", strides=2)(x)))
        return {"a": early, "b": late}

    model = model_of(call, IMAGE)
    assert [graph.default_teacher_layer(model, output) for output in (0, 1)] == ["early", "late"]


@pytest.mark.once
def test_a_doubt_about_the_teacher_layer_is_said():
    inputs = keras.Input(IMAGE)
    members = [with_a_map(name) for name in ("one", "two")]
    ensemble = keras.Model(
        inputs, layers.Average()([member(inputs) for member in members]), name="both"
    )
    with pytest.raises(InputError) as error:
        graph.default_teacher_layer(ensemble)
    assert str(error.value) == (
        "teacher_layer: 'both' has 2 feature maps that could be its last one. Name 'one/features' "
        "or 'two/features'."
    )
    linear = model_of(lambda x: layers.Dense(3)(x), (7,), name="linear")
    with pytest.raises(InputError) as error:
        graph.default_teacher_layer(linear)
    assert str(error.value) == (
        "teacher_layer: 'linear' has no feature map before its classifier. Name a layer, or set "
        "deep_feature_weight and deep_prediction_weight to 0."
    )


@pytest.mark.once
def test_a_known_network_behind_preprocessing():
    network = keras.applications.MobileNetV2(
        weights=None, input_shape=(32, 32, 3), classes=3, alpha=0.35
    )
    inputs = keras.Input((24, 24, 3))
    x = layers.Rescaling(1 / 255)(layers.Resizing(32, 32)(inputs))
    model = keras.Model(inputs, network(x))
    # The last maps are 1×1, and a border is around the last one that is not.
    name = f"{network.name}/block_13_expand_relu"
    assert graph.default_teacher_layer(model) == name
    assert graph.auto_student_layers(model) == [
        f"{network.name}/block_{block}_expand_relu" for block in (1, 3, 6, 13)
    ]
    x = 255 * data((24, 24, 3))
    inside = keras.Model(network.input, network.get_layer("block_13_expand_relu").output)
    expected = inside(model.layers[2](model.layers[1](x)), training=False)
    found = graph.tap("teacher_layer", model, [name])
    assert_close(run(found.model, found.tensors, x), [expected])


@pytest.mark.once
def test_check_names_takes_layers_as_a_whole():
    model = many_named()
    graph.check_names("keep", model, ["shared", "shared#1", "inner/in", "inner#0/in", "split"])
    with pytest.raises(InputError, match=r"^keep: 'stage' should be a known name"):
        graph.check_names("keep", model, ["stage"])
    inner = model.get_layer("inner")
    names = ["inner/in", "inner#1/in", "inner", "innermost/in", "inner#x/in"]
    assert graph.names_inside(inner, names) == ["in", "in"]
