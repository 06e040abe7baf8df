from pathlib import Path

import pytest

import dskd_keras
from dskd_keras.command_line import parse
from dskd_keras.config import ExperimentConfig

CONFIGS = Path(__file__).parent.parent / "configs"


def read(*argv):
    return parse(ExperimentConfig, argv, CONFIGS, "train.py")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_pair_loads(path):
    config = read("--pair", path.stem)
    assert config.pair == path.stem == f"{config.teacher}_{config.student}"
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
        (["--pair", "resnet110_resnet23"], "pair: unknown name 'resnet110_resnet23'. Did you mean"),
        ([*PAIR, "--epoch", "3"], "option: unknown name '--epoch'. Did you mean '--epochs'"),
        ([*PAIR, "--epochs", "many"], "epochs should be a whole number. Received: 'many'."),
        ([*PAIR, "--epochs", "0"], "epochs should be at least 1. Received: 0."),
        ([*PAIR, "--image_size", "x"], "image_size should be a whole number or null"),
        ([*PAIR, "--seeds", "a"], "seeds should be a list, each of it a whole number"),
        ([*PAIR, "--seeds", "1", "1"], "seeds should be different whole numbers"),
        ([*PAIR, "--method", "dksd"], "method: unknown name 'dksd'. Did you mean 'dskd'"),
        ([*PAIR, "--weighting", "sofmax"], "weighting: unknown name 'sofmax'. Did you mean"),
        ([*PAIR, "--temperature", "0"], "temperature should be a positive number. Received: 0.0."),
        ([*PAIR, "--temperature", ".nan"], "temperature should be a positive number"),
        ([*PAIR, "--deep_feature_weight", "-1"], "deep_feature_weight should be a finite number"),
        ([*PAIR, "--label_weight", ".inf"], "label_weight should be a finite number"),
        ([*PAIR, "--validation_fraction", "1"], "validation_fraction should be at least 0 and"),
        ([*PAIR, "--decay_at", "150"], "decay_at should be shares of the training"),
        ([*PAIR, "--nesterov", "--momentum", "0"], "nesterov: True, but momentum is 0"),
        ([*PAIR, "--student_layers"], "student_layers: empty, but method is dskd"),
        ([*PAIR, "--config", "nowhere.yaml"], "nowhere.yaml"),
        ([*PAIR, "stray"], "option: unknown name 'stray'"),
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
        ("epoch: 3\n", "configuration: unknown name 'epoch'. Did you mean 'epochs'"),
        ("epochs: [3\n", "config: not valid YAML: while parsing a flow sequence line 1"),
        ("epochs: soon\n", "epochs should be a whole number. Received: 'soon'."),
        ("- 3\n", ""),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(dskd_keras.InputError) as error:
        read(*PAIR, "--config", str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in ("--seeds", "--teacher_weights", "--min_teacher_accuracy"):
        assert field in text
    assert "A run for each; all share the teacher." in text
