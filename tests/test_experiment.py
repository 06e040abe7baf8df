"""The command line, end to end, on images so small and few that a run takes seconds."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import filelock
import keras
import numpy as np
import pytest
import small
import yaml

import dskd_keras
import train
from dskd_keras import InputError, data, models
from dskd_keras.experiment import (
    build,
    evaluation,
    run_folder,
    saved_models,
    teachers,
    training,
)
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.experiment.run import Run
from dskd_keras.report import RunResult, results_table

ROOT = Path(__file__).parent.parent
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module", autouse=True)
def _eagerly():
    """TensorFlow would spend these tests on compiling; `test_a_compiled_run` does it once."""
    with small.eagerly():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An .npz of 8×8 images whose class shows in their colour."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 60), ("test", 30)):
        labels = np.arange(count) % len(CLASSES)
        pixels = rng.integers(0, 100, (count, 8, 8, 3))
        pixels[np.arange(count), :, :, labels] += 100
        arrays |= {f"x_{part}": pixels.astype("uint8"), f"y_{part}": labels}
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    np.savez(path, class_names=np.array(CLASSES), **arrays)
    return path


def command(images, folder, *flags):
    """Runs train.py in this process, in `folder`; returns its exit status."""
    return train.main(
        [
            "--teacher", "resnet8", "--student", "resnet8", "--dataset", str(images),
            "--epochs", "2", "--batch_size", "16", "--run_dir", str(folder / "run"),
            "--teacher_dir", str(folder / "teachers"), *map(str, flags),
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The folder of a finished run with two seeds."""
    folder = tmp_path_factory.mktemp("finished")
    assert command(images, folder, "--seeds", 0, 1) == 0
    return folder


def history(folder):
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_it_promises(finished):
    folder = finished / "run" / "dskd" / "seed-0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "confusion.csv", "confusion.png", "history.csv", "layer_losses.png",
        "layer_weights.png", "metrics.json", "student.keras", "tensorboard",
    ]  # fmt: skip
    assert sorted(path.name for path in (finished / "run").iterdir()) == [
        "dskd", "learning_curves.png", "report.html",
    ]  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["seeds"] == [0] and config["student"] == "resnet8" and config["epochs"] == 2
    rows = history(folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"loss", "val_accuracy", "deep_feature_allocation/stage2"} <= set(rows[0])

    metrics = json.loads((folder / "metrics.json").read_text())
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert metrics["test_accuracy"] == pytest.approx(accuracies[-1])
    assert metrics["best_accuracy"] == pytest.approx(max(accuracies))
    assert metrics["best_epoch"] == 1 + int(np.argmax(accuracies))
    assert metrics["best_chosen_on"] == "test"
    assert metrics["images_per_second"] > 0 and metrics["latency_ms"] > 0
    assert metrics["command"].endswith(f"--run_dir {finished / 'run'} --teacher_dir "
                                       f"{finished / 'teachers'} --seeds 0 1")  # fmt: skip
    assert metrics["teacher"]["model"] == "resnet8" and metrics["teacher"]["epochs"] == 2
    assert metrics["backend"] == keras.backend.backend() and "keras" in metrics["versions"]
    student = models.create("resnet8", 3, (8, 8, 3))
    assert metrics["parameters"] == sum(int(np.prod(v.shape)) for v in student.trainable_variables)
    assert metrics["weight_bytes"] == sum(4 * int(np.prod(v.shape)) for v in student.variables)
    page = (finished / "run" / "report.html").read_text()
    assert f"{100 * metrics['test_accuracy']:.2f}" in page


def test_deep_supervision_ends_halfway(finished):
    for row, supervised in zip(history(finished / "run/dskd/seed-0"), (1, 0), strict=True):
        row = {name: float(value) for name, value in row.items()}
        deep = row["deep_prediction_loss"] + 10 * row["deep_feature_loss"]
        assert deep > 0
        expected = row["label_loss"] + row["prediction_loss"] + supervised * deep
        assert row["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the others compile anyway")
def test_a_compiled_run(finished, images, tmp_path):
    flags = ["--teacher_dir", finished / "teachers", "--method", "kd", "--epochs", 1]
    with small.eagerly(False):
        assert command(images, tmp_path, *flags, "--teacher_epochs", 2) == 0
    rows = history(tmp_path / "run" / "kd" / "seed-0")
    assert [row["epoch"] for row in rows] == ["1"] and np.isfinite(float(rows[0]["loss"]))


def test_what_is_measured_on_the_test_set(finished, images):
    folder = finished / "run" / "dskd" / "seed-0"
    metrics = json.loads((folder / "metrics.json").read_text())
    data = np.load(images)
    notes = saved_models.read_notes(folder / "student.keras")
    x = ((data["x_test"] / 255 - notes["mean"]) / notes["std"]).astype("float32")
    (cached,) = (finished / "teachers").glob("*.keras")
    student, teacher = (
        keras.models.load_model(path).predict(x, verbose=0).argmax(-1)
        for path in (folder / "student.keras", cached)
    )
    assert metrics["teacher_agreement"] == pytest.approx(np.mean(student == teacher))
    with open(folder / "confusion.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["true \\ predicted", *CLASSES] and [row[0] for row in rows] == [*CLASSES]
    for true, row in enumerate(rows):
        for predicted, count in enumerate(row[1:]):
            assert int(count) == np.sum((data["y_test"] == true) & (student == predicted))


@pytest.mark.parametrize("classes", [{"stage1": 2, "stage2": 3}, {"stage2": 5}])
def test_the_accuracy_of_heads(classes):
    dataset = dskd_keras.data.load("digits", train_examples=100)
    distiller = dskd_keras.Distiller(
        models.create("resnet14", 10, (32, 32, 3)),
        models.create("resnet8", 10, (32, 32, 3)),
        list(classes),
    )
    expected = {}
    # Heads that always see one class are right as often as it occurs.
    for layer, seen in classes.items():
        head = distiller.student_with_heads.get_layer(f"head_{layer}_logits")
        head.bias.assign(1e6 * np.eye(10)[seen])
        expected[layer] = np.mean(dataset.y_test == seen)
    assert len(set(expected.values())) == len(classes)
    run = Run(None, dataset, None)
    assert evaluation.head_accuracies(distiller, run) == pytest.approx(expected)


def test_the_student_is_bare_and_says_what_it_expects(finished, images, tmp_path):
    path = finished / "run" / "dskd" / "seed-0" / "student.keras"
    metrics = json.loads((path.parent / "metrics.json").read_text())
    script = (
        "import sys; sys.modules['dskd_keras'] = None\n"
        "import json, zipfile, keras, numpy as np\n"
        "student, data = sys.argv[1:]\n"
        "notes = json.loads(zipfile.ZipFile(student).read('dskd_keras.json'))\n"
        "data = np.load(data)\n"
        "x = (data['x_test'] / 255 - notes['mean']) / notes['std']\n"
        "logits = keras.models.load_model(student).predict(x.astype('float32'), verbose=0)\n"
        "print(notes['class_names'], (logits.argmax(-1) == data['y_test']).mean())\n"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    printed = subprocess.run(
        [sys.executable, "-c", script, str(path), str(images)],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    ).stdout.strip().splitlines()[-1]  # fmt: skip
    assert printed.startswith("['ant', 'bee', 'cat']")
    assert float(printed.split()[-1]) == pytest.approx(metrics["test_accuracy"])


def test_same_seed_same_numbers(finished, images, tmp_path):
    first = finished / "run" / "dskd"
    assert history(first / "seed-0") != history(first / "seed-1")
    # The teacher of the first run serves again: only the student is trained anew.
    flags = ["--teacher_dir", finished / "teachers"]
    assert command(images, tmp_path, *flags) == 0
    again = tmp_path / "run" / "dskd" / "seed-0"
    assert not (tmp_path / "teachers").exists()
    assert history(again) == history(first / "seed-0")
    weights = [
        keras.models.load_model(folder / "student.keras").get_weights()
        for folder in (again, first / "seed-0")
    ]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
def test_a_finished_run_is_kept(finished, images, tmp_path, capsys):
    student = finished / "run" / "dskd" / "seed-1" / "student.keras"
    before = student.stat().st_mtime_ns, student.read_bytes()
    # The table shows the teacher that the run had; none is made, not even where it is gone.
    flags = ["--seeds", 1, "--teacher_dir", tmp_path / "none"]
    assert command(images, finished, *flags) == 0
    printed = capsys.readouterr().out
    accuracy = json.loads((student.parent / "metrics.json").read_text())["teacher"]["test_accuracy"]
    assert "Seed 1 was finished before" in printed and f"{100 * accuracy:.2f}" in printed
    assert not (tmp_path / "none").exists()
    assert command(images, finished, "--seeds", 1, "--temperature", 3) == 2
    message = capsys.readouterr().err
    assert "holds a run of another configuration (temperature: 4.0 there, 3.0 here)" in message
    assert (student.stat().st_mtime_ns, student.read_bytes()) == before


@pytest.mark.once
def test_a_run_that_another_process_finishes_meanwhile_is_kept(
    finished, images, tmp_path, monkeypatch, capsys
):
    claimed = run_folder.claimed

    def claimed_late(field, folder, *args):
        # The other process ends between the first look at the folder and the claim.
        shutil.copytree(finished / "run" / "dskd" / "seed-0", folder)
        return claimed(field, folder, *args)

    monkeypatch.setattr(run_folder, "claimed", claimed_late)
    assert command(images, tmp_path, "--teacher_dir", finished / "teachers") == 0
    printed = capsys.readouterr().out
    assert "Seed 0 was finished before" in printed and "set aside" not in printed
    (folder,) = (tmp_path / "run" / "dskd").glob("seed-*")
    for name in ("student.keras", "metrics.json", "history.csv"):
        expected = finished / "run" / "dskd" / "seed-0" / name
        assert (folder / name).read_bytes() == expected.read_bytes()


@pytest.mark.once
def test_a_finished_run_is_claimed_too(finished, images, capsys):
    with filelock.FileLock(finished / "run" / "dskd" / ".seed-1.lock"):
        assert command(images, finished, "--seeds", 0, 1, "--export") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: run_dir: another process is working in") and "\n" not in error


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch):
    def acquire(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    said = []
    with run_folder.claimed("run_dir", tmp_path / "run", said.append):
        assert (tmp_path / "run").is_dir()
    assert len(said) == 1 and "can't be locked" in said[0] and "No locks available" in said[0]


def test_weights_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    model = models.create("resnet8", 3, (8, 8, 3))
    models.create("resnet8", 5, (8, 8, 3)).save_weights(tmp_path / "five.weights.h5")
    before = model.get_weights()
    with pytest.raises(InputError, match=r"^teacher_weights: can't load .*five.weights.h5"):
        saved_models.load_weights("teacher_weights", tmp_path / "five.weights.h5", model)
    small.assert_same_bits(before, model.get_weights())


@pytest.mark.once
def test_ce_builds_no_teacher_and_validation_chooses_the_best_epoch(
    images, tmp_path, monkeypatch, capsys
):
    created = []
    create = models.create

    def recorded(name, *args, **kwargs):
        created.append(kwargs["field"])
        return create(name, *args, **kwargs)

    monkeypatch.setattr(models, "create", recorded)
    flags = ["--method", "ce", "--validation_fraction", 0.3, "--include_preprocessing"]
    assert command(images, tmp_path, *flags) == 0
    assert set(created) == {"student"} and not (tmp_path / "teachers").exists()
    folder = tmp_path / "run" / "ce" / "seed-0"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["best_chosen_on"] == "validation"
    accuracies = [float(row["val_accuracy"]) for row in history(folder)]
    assert metrics["best_epoch"] == 1 + int(np.argmax(accuracies))
    assert "label_loss" in history(folder)[0] and "prediction_loss" not in history(folder)[0]

    # With the normalisation inside, the saved students take pixels, as integers too.
    data = np.load(images)
    for name, accuracy in (("student", "test_accuracy"), ("student_best", "best_accuracy")):
        student = keras.models.load_model(folder / f"{name}.keras")
        logits = student.predict(data["x_test"], verbose=0)
        assert (logits.argmax(-1) == data["y_test"]).mean() == pytest.approx(metrics[accuracy])
    notes = saved_models.read_notes(folder / "student.keras")
    assert notes["input"] == "pixels from 0 to 255"
    assert not (folder / "best.weights.h5").exists()
    assert "best on the validation images" in " ".join(capsys.readouterr().out.split())


def accuracy_of(model, images):
    dataset = dskd_keras.data.load(str(images))
    return evaluation.accuracy(evaluation.predicted_classes(model, dataset), dataset)


def config(**fields):
    return ExperimentConfig(**{"teacher": "resnet8", "student": "resnet8", **fields})


def test_the_teachers_key_holds_what_shaped_it_and_no_more(images):
    dataset = dskd_keras.data.load(str(images))

    def recipe_of(dataset, **fields):
        return teachers.recipe(Run(config(**fields), dataset, console=None))

    recipe = recipe_of(dataset)
    for fields in (
        {"temperature": 2.0}, {"student": "resnet14"}, {"seeds": [3]}, {"method": "kd"},
        {"epochs": 5, "teacher_epochs": 240},
        {"learning_rate": 0.01, "teacher_learning_rate": 0.05},
    ):  # fmt: skip
        assert recipe_of(dataset, **fields) == recipe, fields
    for fields in (
        {"teacher": "resnet14"}, {"teacher_seed": 1}, {"teacher_epochs": 5}, {"batch_size": 3},
        {"learning_rate": 0.01}, {"weight_decay": 0.0}, {"augmentation": "none"},
        {"nesterov": True}, {"schedule": "cosine"}, {"decay_at": [0.5]},
    ):  # fmt: skip
        assert recipe_of(dataset, **fields) != recipe, fields
    other = dskd_keras.data.load(str(images), train_examples=30)
    assert recipe_of(other) != recipe


def test_learning_rates():
    steps_per_epoch = 782
    schedule = training.learning_rate(config(), 240 * steps_per_epoch)
    for epoch, rate in ((0, 0.05), (149, 0.05), (150, 0.005), (180, 5e-4), (210, 5e-5)):
        first, last = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1
        assert float(schedule(first)) == pytest.approx(rate), epoch
        if epoch != 149:
            assert float(schedule(max(first - 1, 0))) == pytest.approx(
                rate if epoch == 0 else 10 * rate
            )
        assert float(schedule(last)) == pytest.approx(rate), epoch
    cosine = training.learning_rate(config(schedule="cosine"), 100)
    assert float(cosine(0)) == pytest.approx(0.05) and float(cosine(50)) == pytest.approx(0.025)
    assert training.learning_rate(config(decay_at=[]), 100) == 0.05


@pytest.mark.once
def test_a_weak_teacher_is_refused_before_the_student_trains(finished, images, tmp_path, capsys):
    teachers = finished / "teachers"
    before = [path.read_bytes() for path in teachers.glob("*.keras")]
    flags = ["--teacher_dir", teachers, "--min_teacher_accuracy", 1.0]
    (cached,) = teachers.glob("*.keras")
    broken = keras.models.load_model(cached)
    broken.set_weights([w * 0 for w in broken.get_weights()])
    broken.save(tmp_path / "broken.keras")
    assert command(images, tmp_path, *flags, "--teacher_weights", tmp_path / "broken.keras") == 2
    printed, message = capsys.readouterr()
    assert "Warning: that is hardly more than chance, 33.33 %." in printed
    assert "min_teacher_accuracy: the teacher" in message and "reaches 0.3333" in message
    assert not (tmp_path / "run" / "dskd" / "seed-0" / "history.csv").exists()
    assert [path.read_bytes() for path in teachers.glob("*.keras")] == before


def test_a_teacher_whose_numbers_overflow_is_refused(finished, images, tmp_path, capsys):
    (cached,) = (finished / "teachers").glob("*.keras")
    teacher = keras.models.load_model(cached)
    teacher.get_layer("stem_bn").gamma.assign(np.full(16, 3e4, "float32"))
    teacher.get_layer("stem_bn").beta.assign(np.full(16, 3e4, "float32"))
    teacher.save(tmp_path / "large.keras")
    flags = ["--teacher_weights", tmp_path / "large.keras", "--teacher_dtype", "float16"]
    assert command(images, tmp_path, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("error: teacher_dtype: the logits of")
    assert "not finite" in error and "float16" in error
    assert not (tmp_path / "run" / "dskd" / "seed-0" / "history.csv").exists()


def test_the_teacher_is_folded_before_it_teaches(finished, images):
    dataset = data.load(str(images))
    teacher = models.create("resnet8", 3, (8, 8, 3))

    def ready(**fields):
        return teachers.ready_to_teach(Run(config(**fields), dataset, console=None), teacher)

    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in ready().layers)
    assert ready(fold_teacher=False) is teacher
    # A convolution whose own output is to teach stays what it is.
    kept = ready(teacher_layer="stem_conv")
    assert kept.get_layer("stem_conv").bias is None and kept.get_layer("stem_bn").gamma is not None
    kept = ready(teacher_layer=["stem_conv", "stage1"], student_layers=["stage1", "stage2"])
    assert kept.get_layer("stem_conv").bias is None
    assert ready(teacher_dtype="bfloat16").get_layer("stem_bn").compute_dtype == "bfloat16"
    teacher.get_layer("stem_bn").gamma.assign(np.full(16, 1e8, "float32"))
    with pytest.raises(InputError, match=r"^teacher_dtype: weight 'stem_bn/kernel'.*float16\.$"):
        ready(teacher_dtype="float16")
    # The student has its precision, the teacher that is trained for it has float32.
    mixed = Run(config(dtype_policy="mixed_bfloat16"), dataset, console=None)
    assert build.create_student(mixed).get_layer("stem_conv").compute_dtype == "bfloat16"
    assert build.create_teacher(mixed).compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"
    # Reported is the model as it was trained.
    metrics = json.loads((finished / "run/dskd/seed-0/metrics.json").read_text())
    assert metrics["teacher"]["parameters"] == metrics["parameters"]


def flip_a_byte(source, target):
    """Copies a .keras file with one bit of its weights changed."""
    with zipfile.ZipFile(source) as archive:
        info = archive.getinfo("model.weights.h5")
    data = bytearray(source.read_bytes())
    data[info.header_offset + info.file_size // 2] ^= 1
    target.write_bytes(data)


@pytest.mark.once
@pytest.mark.slow
def test_teacher_files_of_all_kinds(finished, images, tmp_path, capsys):
    (cached,) = (finished / "teachers").glob("*.keras")
    teacher = keras.models.load_model(cached)
    teacher.save_weights(tmp_path / "good.weights.h5")
    models.create("resnet14", 3, (8, 8, 3)).save_weights(tmp_path / "foreign.weights.h5")
    models.create("resnet8", 5, (8, 8, 3)).save(tmp_path / "five.keras")
    models.create("resnet14", 3, (8, 8, 3)).save(tmp_path / "other.keras")
    other = models.create("resnet14", 3, (8, 8, 3))
    dskd_keras.Distiller(other, models.create("resnet8", 3, (8, 8, 3)), ["stage1"]).save(
        tmp_path / "distiller.keras"
    )
    (tmp_path / "text.keras").write_text("no model")
    (tmp_path / "teacher.txt").write_text("no model")
    (tmp_path / "text.weights.h5").write_text("no weights")
    (tmp_path / "short.keras").write_bytes(cached.read_bytes()[:-5000])
    flip_a_byte(cached, tmp_path / "flipped.keras")
    for name, message in {
        "none.keras": "there is no file",
        "none.pth": "there is no file",
        "teacher.txt": "should be a .keras or a .weights.h5 file, or a PyTorch checkpoint",
        "text.keras": "can't load",
        "text.weights.h5": "can't load",
        "short.keras": "can't load",
        "flipped.keras": "is damaged",
        "foreign.weights.h5": "for resnet8: it holds the weights of other layers",
        "five.keras": "holds 'resnet8' from (8, 8, 3) to 5 classes, where 'resnet8' from (8, 8, 3)",
        "other.keras": "holds 'resnet14' from (8, 8, 3) to 3 classes, where 'resnet8'",
        "distiller.keras": "holds a Distiller",
    }.items():
        assert command(images, tmp_path, "--teacher_weights", tmp_path / name) == 2, name
        error = capsys.readouterr().err.strip()
        assert message in error and error.startswith("error: teacher") and "\n" not in error, name
    assert not (tmp_path / "run" / "dskd" / "seed-0" / "history.csv").exists()

    accuracy = accuracy_of(teacher, images)
    flags = ["--teacher_weights", tmp_path / "good.weights.h5", "--epochs", 1]
    assert command(images, tmp_path, *flags) == 0
    assert f"Teacher resnet8: {100 * accuracy:.2f} % on the test set" in capsys.readouterr().out
    assert not (tmp_path / "teachers").exists()


@pytest.mark.once
def test_a_pytorch_teacher(finished, images, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    (cached,) = (finished / "teachers").glob("*.keras")
    teacher = keras.models.load_model(cached)
    tensors = {}
    for layer in teacher.layers:
        for kind, value in zip(
            ("weight", "bias", "running_mean", "running_var"), layer.get_weights(), strict=False
        ):
            order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, (0,))
            key = f"{models.resnet.torch_module('resnet8', layer.name)}.{kind}"
            tensors[key] = torch.from_numpy(value.transpose(order).copy())
    torch.save({"epoch": 240, "model": tensors}, tmp_path / "ckpt_epoch_240.pth")
    torch.save({"model": {"fc.bias": tensors["fc.bias"]}}, tmp_path / "student_best")
    assert command(images, tmp_path, "--teacher_weights", tmp_path / "student_best") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: teacher_weights: ") and "\n" not in error
    assert "does not fit resnet8; missing keys: conv1.weight, bn1.weight" in error

    accuracy = accuracy_of(teacher, images)
    flags = ["--teacher_weights", tmp_path / "ckpt_epoch_240.pth", "--epochs", 1]
    assert command(images, tmp_path, *flags) == 0
    assert f"Teacher resnet8: {100 * accuracy:.2f} % on the test set" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--teacher", "resnet9"],
            "teacher: 'resnet9' should be a known name. Did you mean 'r",
        ),
        (["--student", "resnet111"], "student: 'resnet111' should be a known name. Did you mean"),
        (
            ["--student_layers", "stage5"],
            "student_layers: 'stage5' should be a known name. Did",
        ),
        (["--student_layers", "images"], "layer 'images' has no usable feature map"),
        (
            ["--teacher_layer", "stage"],
            "teacher_layer: 'stage' should be a known name. Did",
        ),
        (
            ["--teacher_dtype", "int8"],
            "teacher_dtype: 'int8' should be a known name. Choices",
        ),
        (
            ["--teacher_dtype", "bfloat16", "--fold_teacher", "false"],
            "teacher_dtype: bfloat16, but fold_teacher is false",
        ),
        (
            ["--dtype_policy", "float16"],
            "dtype_policy: 'float16' should be a known name. Did",
        ),
        (
            ["--dtype_policy", "mixed_bfloat16", "--export", "onnx"],
            "export: onnx, but dtype_policy is mixed_bfloat16",
        ),
        (["--dataset", "digitz"], "digits"),
        (["--dataset", "./nothing.npz"], "nothing.npz"),
        (["--train_examples", "1000"], "train_examples"),
        (
            ["--augment_on", "device", "--augmentation", "resized_crop_flip"],
            "augment_on: device, but augmentation is resized_crop_flip, which resizes",
        ),
        (
            ["--augment_on", "device", "--cached_views", "2"],
            "augment_on: device, but cached_views is 2: the views are made once, on the host. Set",
        ),
        (["--devices", "2", "--cached_views", "2"], "devices: 2, but cached_views is 2: each step"),
        (["--cached_views", "300"], "cached_views: 300, but epochs is "),
        (["--checkpoint_steps", "0"], "checkpoint_steps: 0 should be a whole number of at least 1"),
        (
            ["--export", "tflite"],
            "export: 'tflite' should be a known name. Did you mean 'litert'? Choices: onnx",
        ),
    ],
)
def test_bad_input_is_one_line_before_training(images, tmp_path, capsys, flags, message):
    assert command(images, tmp_path, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "teachers").exists()


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras has no such steps there")
def test_steps_that_would_run_over_an_epochs_end_are_refused(images, tmp_path, capsys):
    assert command(images, tmp_path, "--steps_per_execution", "7") == 2
    assert capsys.readouterr().err.startswith("error: steps_per_execution: 7, but an epoch has ")


def test_bad_backends(tmp_path):
    script = (
        "import sys; sys.modules['jax'] = None; import train; "
        "sys.exit(train.main(['--pair', 'resnet20_resnet8']))"
    )
    for backend, message in {
        "jaxx": "error: KERAS_BACKEND: 'jaxx' should be a known name. Did you mean 'jax'?",
        "jax": "error: KERAS_BACKEND: 'jax' is not installed. Set KERAS_BACKEND=tensorflow or",
    }.items():
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False,
            env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2 and done.stderr.startswith(message), done.stderr


def test_a_folder_that_cannot_be_written(images, tmp_path, capsys):
    (tmp_path / "run").write_text("a file where the folder should be")
    assert command(images, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run_dir: can't") and "Traceback" not in error


def test_labels_outside_the_classes(images, tmp_path, capsys):
    data = dict(np.load(images))
    data["y_test"] = data["y_test"] + 1
    np.savez(tmp_path / "bad.npz", **data)
    assert command(tmp_path / "bad.npz", tmp_path) == 2
    error = capsys.readouterr().err.strip()
    assert "y_test" in error and "3" in error and "\n" not in error


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="for the backends that do without it"
)
def test_the_main_job_runs_where_importing_tensorflow_fails(tmp_path):
    script = (
        "import sys\n"
        "for name in ('tensorflow', 'tensorflow_datasets'): sys.modules[name] = None\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import train\n"
        "sys.exit(train.main(sys.argv[2:]))\n"
    )
    flags = ["--pair", "resnet20_resnet8", "--teacher", "resnet8", "--epochs", "1"]
    flags += ["--train_examples", "64", "--batch_size", "32"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), *flags],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "resnet20_resnet8" / "dskd" / "seed-0"
    assert (folder / "student.keras").exists() and "resnet8" in done.stdout


def test_table_has_mean_and_deviation_over_seeds():
    from rich.console import Console

    results = [
        RunResult("teacher", "resnet56", 861620, 0.7234),
        *(
            RunResult("dskd", "resnet20", 278324, accuracy, best_accuracy=accuracy + 0.01,
                      best_epoch=3, best_chosen_on="validation", images_per_second=100.0, seed=seed)
            for seed, accuracy in enumerate((0.70, 0.71, 0.72))
        ),
    ]  # fmt: skip
    console = Console(width=120, record=True)
    console.print(results_table("cifar100, dskd", results))
    text = " ".join(console.export_text().split())
    assert "72.34" in text and "861,620" in text
    assert "71.00 ± 1.00" in text and "72.00 ± 1.00" in text and "0 1 2" in text
    assert "best on the validation images" in text
