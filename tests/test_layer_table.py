import keras
import pytest
import small
from keras import layers

from dskd_keras import InputError, graph, layer_table, models

pytestmark = pytest.mark.once  # shapes and names, no values


def chain(*parts, shape=(28, 28, 1), name="net"):
    """A classifier of layers one after the other."""
    inputs = x = keras.Input(shape, name="images")
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x, name=name)


def conv(name, width=4, size=3, padding="same", strides=1):
    return layers.Conv2D(
        width, size, padding=padding, strides=strides, name=name, data_format="channels_last"
    )


def max_pool(name=None):
    return layers.MaxPooling2D(name=name, data_format="channels_last")


def ending():
    return [
        layers.GlobalAveragePooling2D(data_format="channels_last"),
        layers.Dense(3, name="logits"),
    ]


def up():
    return layers.UpSampling2D(data_format="channels_last")


# What "auto" finds in the zoo: the ends of stages; before a normalisation or an expansion that
# belongs to the next stage as computation, after it.
OF_THE_ZOO = {
    "resnet20": ["stage1", "stage2", "stage3"],
    "resnet8x4": ["stage1", "stage2", "stage3"],
    "resnet18": ["stage1", "stage2", "stage3", "stage4"],
    "ResNet50": ["stage1", "stage2", "stage3", "stage4"],
    "wrn_16_2": ["stage2_block1_relu1", "stage3_block1_relu1", "final_relu"],
    "vgg8": ["stage1", "stage2", "stage3", "stage5"],
    "MobileNetV2": [*(f"stage{n}_block1_expand_relu" for n in (2, 3, 4)), "head_relu"],
    "ShuffleV1": ["stem_relu", "stage1", "stage2", "stage3"],
    "ShuffleV2": ["stem_relu", "stage1", "stage2", "head_relu"],
}


@pytest.mark.parametrize("name", OF_THE_ZOO)
def test_auto_takes_the_last_layer_of_each_resolution(name):
    student = models.create(name, 10, (32, 32, 3))
    assert graph.auto_student_layers(student) == OF_THE_ZOO[name]


def residual(x):
    """Two stages; the second begins with a convolution at the size of the first."""
    x = layers.ReLU(name="end_of_first")(conv("stem")(x))
    branch = layers.ReLU()(conv("reduce", 2, 1)(x))
    branch = conv("expand", strides=2)(branch)
    x = layers.Add(name="sum")([branch, conv("shortcut", 4, 1, strides=2)(x)])
    return ending()[1](ending()[0](x))


def test_what_leads_around_a_layer_makes_it_no_end_of_a_stage():
    inputs = keras.Input((8, 8, 2))
    assert graph.auto_student_layers(keras.Model(inputs, residual(inputs))) == [
        "end_of_first",
        "sum",
    ]


def test_unpadded_convolutions_stay_in_their_resolution():
    parts = [conv("a", padding="valid"), conv("b", padding="valid"), max_pool()]
    parts += [conv("c", padding="valid"), max_pool("last"), layers.Flatten(), layers.Dense(3)]
    # 26, 24; 12, 10; 5, where no layer learns any more.
    assert graph.auto_student_layers(chain(*parts)) == ["b", "c"]


def test_auto_goes_into_nested_models_behind_preprocessing():
    backbone = chain(
        conv("a"), max_pool(), conv("b"), max_pool(), conv("c"), shape=(16, 16, 1), name="backbone"
    )
    resize = layers.Resizing(16, 16, data_format="channels_last")
    student = chain(layers.Rescaling(1 / 255), resize, backbone, *ending())
    assert graph.auto_student_layers(student) == ["backbone/a", "backbone/b", "backbone"]


def test_auto_in_a_network_that_goes_down_and_up_again():
    inputs = keras.Input((16, 16, 1))
    first = conv("first")(inputs)
    second = conv("second")(max_pool()(first))
    third = conv("third")(max_pool()(second))
    x = conv("fourth")(layers.Concatenate()([up()(third), second]))
    x = conv("fifth")(layers.Concatenate()([up()(x), first]))
    student = keras.Model(inputs, conv("logits", 3, 1)(x))
    assert graph.auto_student_layers(student) == ["third", "fourth", "fifth"]


def test_auto_for_another_output():
    inputs = keras.Input((16, 16, 1))
    x = conv("b")(max_pool()(conv("a")(inputs)))
    early = layers.Dense(3)(layers.Flatten()(x))
    late = layers.Dense(3)(layers.Flatten()(conv("c")(max_pool()(x))))
    student = keras.Model(inputs, [early, late])
    assert graph.auto_student_layers(student, 0) == ["a", "b"]
    assert graph.auto_student_layers(student, 1) == ["a", "b", "c"]


def transformer():
    inputs = keras.Input((8, 8, 2))
    x = layers.Reshape((16, 4))(conv("patches", strides=2)(inputs))
    for block in ("one", "two"):
        attention = layers.MultiHeadAttention(2, 2, name=f"{block}_attention")
        x = layers.Add(name=block)([x, attention(x, x)])
    return keras.Model(inputs, layers.Dense(3)(x[:, 0]), name="net")


def test_where_no_resolution_tells_auto_names_what_could_be_taken():
    perceptron = [layers.Dense(5, name="one"), layers.ReLU(), layers.Dense(4, name="two")]
    cases = {
        transformer(): "whose feature maps have all one resolution. Name some layers, such as "
        "'one' or 'two'.",
        chain(*perceptron, layers.Dense(3), shape=(7,)): "which has no feature maps with "
        "positions. Name some layers, such as 'one' or 'two'.",
        chain(layers.Dense(3), shape=(7,)): "which has no feature maps with positions. Name some "
        "layers.",
        chain(conv("a"), max_pool(), conv("b"), *ending(), shape=(None, None, 2)): "whose feature "
        "maps have unknown sizes. Name some layers, such as 'a' or 'b'.",
    }
    for student, reason in cases.items():
        with pytest.raises(InputError) as error:
            graph.auto_student_layers(student)
        assert str(error.value) == (
            "student_layers: 'auto' takes the last layer of each resolution, which can't be told "
            f"in 'net', {reason}"
        )


def nested():
    backbone = chain(conv("a"), max_pool("smaller"), conv("b"), shape=(8, 8, 1), name="backbone")
    return chain(backbone, *ending(), shape=(8, 8, 1))


def layers_of(teacher, student, names):
    """What supervises the student's layers by default."""
    return graph.matching_teacher_layers(graph.auto_teacher_layers(teacher), student, 0, names)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ("resnet20", "resnet8", ["stage1", "stage2", "stage3"]),
        # 32, 16, 8 under 32, 16, 8, 4: the student's first stage under the teacher's second.
        ("resnet18", "resnet8", ["stage2", "stage3", "stage4"]),
        # The other way round: the first two under the first.
        ("resnet20", "resnet18", ["stage1", "stage1", "stage2", "stage3"]),
    ],
)
def test_a_layer_gets_the_teachers_of_the_same_place(teacher, student, expected):
    teacher, student = (models.create(name, 10, (32, 32, 3)) for name in (teacher, student))
    names = graph.auto_student_layers(student)
    assert layers_of(teacher, student, names) == expected
    # A layer within a resolution goes with the last one of it.
    assert layers_of(teacher, student, [f"{names[-1]}_block1_relu1"]) == expected[-1:]


def test_layers_of_nested_models_have_a_place_by_each_of_their_names():
    student = nested()
    teacher = chain(conv("one"), max_pool(), conv("two"), *ending(), shape=(8, 8, 1))
    names = ["backbone/a", "backbone/smaller", "backbone/b", "backbone"]
    assert layers_of(teacher, student, names) == ["one", "two", "two", "two"]


def test_where_no_place_tells_it_is_the_last_map():
    teacher = chain(conv("one"), max_pool(), conv("two"), *ending(), shape=(8, 8, 1))
    perceptron = chain(layers.Flatten(), layers.Dense(5, name="hidden"), layers.Dense(3))
    assert layers_of(teacher, perceptron, ["hidden"]) == ["two"]
    assert graph.auto_teacher_layers(transformer()) == ["two"]
    assert graph.auto_teacher_layers(perceptron) == ["hidden"]


def test_rows_say_what_an_output_depends_on():
    found = layer_table.rows(nested())
    of_a, of_both = 3 * 3 * 4 + 4, 3 * 3 * 4 + 4 + 3 * 3 * 16 + 4
    assert [tuple(row) for row in found if not row.name.startswith("global")] == [
        ("backbone", (None, 4, 4, 4), 0, of_both),
        ("backbone/a", (None, 8, 8, 4), 0, of_a),
        ("backbone/smaller", (None, 4, 4, 4), 1, of_a),
        ("backbone/b", (None, 4, 4, 4), 1, of_both),
        ("logits", (None, 3), 2, of_both + 4 * 3 + 3),
    ]


def test_shared_weights_are_counted_once():
    shared = layers.Dense(4, name="shared")
    student = chain(shared, shared, layers.Dense(3, name="logits"), shape=(4,))
    parameters = {row.name: row.parameters for row in layer_table.rows(student)}
    assert parameters == {"shared#0": 20, "shared#1": 20, "logits": 35}


def test_the_summary_shows_the_names_and_what_is_suggested(capsys):
    layer_table.summary(small.convnet("student"))
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["student:", "447", "parameters"]
    by_name = {line[0]: line for line in lines if line}
    both = "student, teacher"
    assert by_name["stage1"] == f"stage1 [B, 8, 8, 4] 92 20.6% {both}".split()
    assert by_name["stage2"] == f"stage2 [B, 4, 4, 8] 420 94.0% {both}".split()
    assert by_name["logits"] == ["logits", "[B,", "3]", "447", "100.0%"]
    assert "images" not in printed
    # What the last column means, no doubts, and no unknown sizes.
    assert printed.splitlines()[-2:] == [
        'student: one that student_layers="auto" takes.',
        'teacher: one that teacher_layer="auto" takes.',
    ]
    # Between resolutions a line is empty.
    names = [line[0] if line else "" for line in lines]
    assert names[names.index("stage1") + 1] == "" == names[names.index("stage2") + 1]


def test_the_summary_says_what_is_not_known_before_the_model_runs(capsys):
    layer_table.summary(chain(layers.Conv2D(3, 3, name="only"), shape=(None, None, 3)))
    assert "?: a size that is known when the model runs." in capsys.readouterr().out


def test_the_summary_says_doubts(capsys):
    layer_table.summary(chain(layers.Dense(3, name="only"), shape=(7,)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[-2:]] == ["student_layers", "teacher_layer"]
    with pytest.raises(InputError, match=r"^model: dict should be a keras\.Model"):
        layer_table.summary({})
