import dataclasses
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import dskd_keras
from dskd_keras import heads, losses, weighting
from dskd_keras.experiment import config as config_module
from dskd_keras.experiment.command_line import parse
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.tuning.config import SearchConfig

CONFIGS = Path(__file__).parent.parent / "configs"


def read(*argv):
    return parse(ExperimentConfig, argv, "train.py")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_pair_loads(path):
    config = read("--pair", path.stem)
    models = f"{config.teacher}_{config.student}"
    assert config.pair == path.stem and path.stem in (models, f"{models}_{config.dataset}")
    assert {config.teacher, config.student} <= set(dskd_keras.models.names())
    assert config.folder() == Path("runs") / path.stem
    assert path.read_text().startswith("#") and f"--pair {path.stem}" in path.read_text()


def test_the_protocol_is_the_published_one():
    config = read("--pair", "resnet110_resnet32")
    assert (config.epochs, config.batch_size, config.learning_rate) == (240, 64, 0.05)
    assert (config.momentum, config.nesterov, config.weight_decay) == (0.9, False, 5e-4)
    assert [share * config.epochs for share in config.decay_at] == [150, 180, 210]
    assert (config.temperature, config.min_teacher_accuracy) == (4.0, 0.72)


PUBLISHED = {
    "resnet110_resnet32": 0.05,
    "resnet110_resnet20": 0.05,
    "resnet56_resnet20": 0.05,
    "resnet32x4_resnet8x4": 0.05,
    "vgg13_vgg8": 0.05,
    "wrn_40_2_wrn_40_1": 0.05,
    "wrn_40_2_wrn_16_2": 0.05,
    "ResNet50_vgg8": 0.05,
    "vgg13_MobileNetV2": 0.01,
    "ResNet50_MobileNetV2": 0.01,
    "resnet32x4_ShuffleV1": 0.01,
    "resnet32x4_ShuffleV2": 0.01,
    "wrn_40_2_ShuffleV1": 0.01,
}


@pytest.mark.parametrize("pair", PUBLISHED)
def test_the_learning_rates_are_the_published_ones(pair):
    config = read("--pair", pair)
    assert config.learning_rate == PUBLISHED[pair]
    assert (config.teacher_learning_rate or config.learning_rate) == 0.05
    assert (config.dataset, config.epochs, config.batch_size) == ("cifar100", 240, 64)
    assert config.min_teacher_accuracy >= 0.7


def test_the_protocol_of_tiny_imagenet():
    for student in ("MobileNetV2_tinyimagenet", "ShuffleV2"):
        config = read("--pair", f"resnet18_{student}")
        assert (config.dataset, config.epochs, config.batch_size) == ("tiny_imagenet", 200, 256)
        assert (config.learning_rate, config.teacher_learning_rate) == (0.2, None)
        assert [round(share * config.epochs) for share in config.decay_at] == [60, 120, 160]


def test_pairs_are_found_without_regard_to_case():
    for argv in (["--pair", "resnet50_mobilenetv2"], ["--pair=RESNET50_MOBILENETV2"]):
        config = read(*argv)
        assert config.pair == "ResNet50_MobileNetV2"
        assert config.folder() == Path("runs/ResNet50_MobileNetV2")


def test_flags_overrule_files_in_any_order(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nbatch_size: 16\n")
    for argv in (
        ["--epochs", "3", "--config", str(file), "--pair", "resnet20_resnet8"],
        ["--pair=resnet20_resnet8", f"--config={file}", "--epochs=3"],
    ):
        config = read(*argv)
        assert (config.epochs, config.batch_size, config.dataset) == (3, 16, "digits")


def test_lists_and_switches_read_as_one_writes_them():
    config = read("--pair", "resnet20_resnet8", "--seeds", "0", "1", "2", "--nesterov",
                  "--student_layers", "stage1", "--decay_at", "--method", "kd")  # fmt: skip
    assert config.seeds == [0, 1, 2] and config.nesterov is True
    assert config.student_layers == ["stage1"] and config.decay_at == []
    config = read("--pair", "resnet20_resnet8", "--seeds", "[3, 4]", "--nesterov", "false",
                  "--run_dir=out")  # fmt: skip
    assert config.seeds == [3, 4] and config.nesterov is False and config.run_dir == "out"


def test_yaml_round_trip(tmp_path):
    config = read("--pair", "resnet56_resnet20", "--seeds", "4", "--train_examples", "100")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert read("--config", str(tmp_path / "config.yaml")) == config


PAIR = ("--pair", "resnet20_resnet8")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--pair", "resnet110_resnet23"], "pair: 'resnet110_resnet23' should be a known name"),
        ([*PAIR, "--epoch", "3"], "option: '--epoch' should be a known name. Did you mean '--ep"),
        ([*PAIR, "--epochs", "many"], "epochs: 'many' should be a whole number."),
        ([*PAIR, "--epochs", "0"], "epochs: 0 should be a whole number of at least 1."),
        ([*PAIR, "--epochs", "1", "2"], "epochs: '1 2' should be one value."),
        ([*PAIR, "--epochs"], "epochs: '' should be one value."),
        ([*PAIR, "--image_size", "x"], "image_size: 'x' should be a whole number or null"),
        ([*PAIR, "--seeds", "a"], "seeds: '[a]' should be a list, each of it a whole number"),
        ([*PAIR, "--seeds", "1", "1"], "seeds: [1, 1] should be different whole numbers"),
        ([*PAIR, "--method", "dksd"], "method: 'dksd' should be a known name. Did you mean 'dskd'"),
        ([*PAIR, "--weighting", "sofmax"], "weighting: 'sofmax' should be a known name. Did you"),
        ([*PAIR, "--export", "onnx", "tflite"], "export: 'tflite' should be a known name. Did you"),
        ([*PAIR, "--temperature", "0"], "temperature: 0.0 should be a positive number."),
        ([*PAIR, "--temperature", ".nan"], "temperature: nan should be a positive number."),
        ([*PAIR, "--deep_feature_weight", "-1"], "deep_feature_weight: -1.0 should be a number of"),
        ([*PAIR, "--label_weight", ".inf"], "label_weight: inf should be a number of at least 0."),
        ([*PAIR, "--validation_fraction", "1"], "validation_fraction: 1.0 should be a number of"),
        ([*PAIR, "--decay_at", "150"], "decay_at: [150.0] should be shares of the training"),
        ([*PAIR, "--nesterov", "--momentum", "0"], "nesterov: True, but momentum is 0"),
        ([*PAIR, "--student_layers"], "student_layers: empty, but method is dskd"),
        (
            [*PAIR, "--student_layers", "stage1", "stage2", "--teacher_layer", "[a, b, c]"],
            "teacher_layer: 3 layers, but there are 2 student_layers. Name one for all, or one for",
        ),
        ([*PAIR, "--config", "nowhere.yaml"], "config: can't read 'nowhere.yaml'"),
        (["stray", *PAIR], "option: 'stray' should be a known name"),
        ([*PAIR, "stray"], "pair: 'resnet20_resnet8 stray' should be one value."),
        ([*PAIR, "--teacher", "resnet9"], "teacher: 'resnet9' should be a known name. Did you"),
        (["--epochs", "3"], "teacher: not given. Choose a pair"),
    ],
)  # fmt: skip
def test_bad_flags(argv, message):
    with pytest.raises(dskd_keras.InputError) as error:
        read(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("epoch: 3\n", "mine.yaml': 'epoch' should be a known name. Did you mean 'epochs'"),
        ("epochs: [3\n", "line 2 should be valid YAML: expected ',' or ']'"),
        ("epochs: soon\n", "epochs: 'soon' should be a whole number."),
        ("seeds: 3\n", "seeds: 3 should be a list"),
        ("export: [onnx, tflite]\n", "export: 'tflite' should be a known name."),
        ("- 3\n", "should hold fields with their values"),
        ("", "should hold fields with their values"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(dskd_keras.InputError) as error:
        read(*PAIR, "--config", str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_has_the_names_that_the_package_has():
    of_maps = {*typing.get_args(config_module.FeatureLoss)}
    of_logits = {*typing.get_args(config_module.PredictionLoss)}
    # Data sets of the command line have classes, so that no binary loss is compiled.
    assert of_maps | of_logits | {"binary_kl_divergence"} == {*losses.names()}
    assert {*typing.get_args(config_module.Head)} == {*heads.names()}
    assert {*typing.get_args(config_module.Weighting)} == {*weighting.names()}


@pytest.mark.parametrize(
    "flags, unused",
    [
        ((), []),
        (("--deep_feature_weight", "3", "--head", "pointwise"), []),
        (("--method", "kd", "--temperature", "3"), []),
        (("--method", "kd", "--deep_feature_weight", "3"), ["deep_feature_weight"]),
        (("--method", "kd", "--student_layers", "stage1"), ["student_layers"]),
        (("--method", "ce", "--temperature", "3"), ["temperature"]),
        (("--weighting_temperature", "2"), ["weighting_temperature"]),
        (("--weighting_temperature", "2", "--weighting", "softmax"), []),
    ],
)
def test_what_the_method_passes_over_is_known(flags, unused):
    assert read(*PAIR, *flags).unused() == unused


def test_one_teacher_layer_or_one_for_each(tmp_path):
    assert read(*PAIR, "--teacher_layer", "stage3").teacher_layer == "stage3"
    each = ["stage1", "stage2"]
    assert read(*PAIR, "--teacher_layer", *each).teacher_layer == each
    file = tmp_path / "mine.yaml"
    for layers in ("stage3", each):
        file.write_text(f"teacher_layer: {layers}\n")
        assert read(*PAIR, "--config", str(file)).teacher_layer == layers


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(ExperimentConfig):
        assert f"--{field.name} " in text
    assert "A run for each; all share the teacher. Default: 0." in text
    assert "objective: --student_layers TEXT ..." in text and "files: --run_dir TEXT" in text


def test_what_is_shown_is_what_is_run(capsys, tmp_path):
    flags = ["--pair", "resnet56_resnet20", "--seeds", "4", "--run_dir", "2024", "--nesterov"]
    with pytest.raises(SystemExit) as stop:
        read(*flags, "--print_config")
    assert stop.value.code == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    config = read("--config", str(tmp_path / "shown.yaml"))
    assert config == read(*flags) and config.run_dir == "2024"


MISTAKES = [
    ["--pair", "resnet110_resnet23"], [*PAIR, "--epoch", "3"], [*PAIR, "--epochs", "many"],
    [*PAIR, "--epochs", "0"], [*PAIR, "--student", "resnet9"], [*PAIR, "--dataset", "none.npz"],
    [*PAIR, "--teacher_weights", "none.keras"], [*PAIR, "--config", "none.yaml"], ["--help"],
    [*PAIR, "--print_config"], [*PAIR, "--dtype_policy", "mixed_bfloat16", "--export", "onnx"],
]  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("command", ["train", "tune"])
def test_an_answer_needs_neither_keras_nor_matplotlib(command, tmp_path):
    script = (
        "import sys\n"
        f"from dskd_commands import {command}\n"
        "for argv in eval(sys.argv[1]):\n"
        "    try:\n"
        f"        assert {command}(argv) == 2, argv\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0, argv\n"
        "loaded = {'keras', 'numpy', 'matplotlib', 'keras_tuner', 'tensorflow'} & {*sys.modules}\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, repr(MISTAKES)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(MISTAKES) - 2 and all(line.startswith("error: ") for line in errors)


def test_the_field_that_is_wrong_is_named_whatever_else_is_given(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nranges: {temperature: [1, x]}\n")
    with pytest.raises(dskd_keras.InputError, match=r"^ranges.temperature: \[1, 'x'\] should be"):
        parse(SearchConfig, [*PAIR, "--config", str(file)], "tune.py")
    file.write_text("ranges: {temperatur: [1, 2]}\n")
    with pytest.raises(dskd_keras.InputError, match=r"^ranges: 'temperatur' should be a known"):
        parse(SearchConfig, [*PAIR, "--config", str(file)], "tune.py")
    file.write_text("ranges: 3\n")
    with pytest.raises(dskd_keras.InputError, match=r"^ranges: 3 should be fields of temperature"):
        parse(SearchConfig, [*PAIR, "--config", str(file)], "tune.py")
