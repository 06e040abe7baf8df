"""The search's command, end to end, on few images of digits."""

import csv
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import keras
import pytest
import yaml

import train
import tune
from dskd_keras import models
from dskd_keras.data import ImageDataset
from dskd_keras.errors import TrainingError
from dskd_keras.experiment import pipeline, training
from dskd_keras.tuning import search_pictures, workers
from dskd_keras.tuning import trials as trials_module

# Batches of one size: PyTorch traces the teacher for each, the others compile a program.
FLAGS = [
    "--teacher", "resnet8", "--student", "resnet8", "--dataset", "digits", "--image_size", "8",
    "--train_examples", "100", "--epochs", "1", "--batch_size", "15",
]  # fmt: skip
# Three trials of one epoch, the best of which goes on for two more.
HYPERBAND = ("--tuner", "hyperband", "--max_trials", 4, "--trial_epochs", 3)
NO_STATISTICS = ("seconds", "peak_memory_mib")
PICTURES = {name: getattr(search_pictures, name) for name in ("parameters", "progress")}


@pytest.fixture(scope="module", autouse=True)
def _faster():
    """Without pictures, and without looking through the imports' objects after every trial."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patched:
        for name in PICTURES:
            patched.setattr(search_pictures, name, lambda results: None)
        patched.setattr(pipeline.report, "write", lambda folders: "no report")
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A saved teacher that has learnt nothing."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.keras"
    keras.utils.set_random_seed(0)
    models.create("resnet8", 10, (8, 8, 3)).save(path)
    return path


@pytest.fixture(scope="module")
def one_trial(teacher, tmp_path_factory):
    """The folder of a finished search of one trial, to be copied."""
    folder = tmp_path_factory.mktemp("one-trial")
    assert tune.main(flags(folder, teacher, "--max_trials", 1)) == 0
    return folder


@pytest.fixture(scope="module")
def hyperband(teacher, tmp_path_factory):
    """The folder of a finished search by Hyperband."""
    folder = tmp_path_factory.mktemp("hyperband")
    assert tune.main(flags(folder, teacher, *HYPERBAND)) == 0
    return folder


def flags(folder, teacher, *more):
    return [
        *FLAGS, "--run_dir", str(folder / "run"), "--teacher_dir", str(folder / "teachers"),
        *(["--teacher_weights", str(teacher)] if teacher else []), *map(str, more),
    ]  # fmt: skip


def trials(folder):
    with open(folder / "run" / "search" / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(folder):
    """What every trial tried and came to, by its id."""
    return {
        row["trial"]: {name: row[name] for name in row if name not in NO_STATISTICS}
        for row in trials(folder)
    }


def history(place):
    with open(place / "seed-0" / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def last_error(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def fail(*_, **__):
    raise TrainingError("no.")


@pytest.fixture
def parts(monkeypatch):
    """The parts of the data that trainings evaluate on."""
    seen, training_now = [], []
    evaluation_batches, train_student = training.evaluation_batches, training.train

    def noted(dataset, part, *more):
        seen.extend([part] if training_now else [])
        return evaluation_batches(dataset, part, *more)

    def trained(*args, **kwargs):
        training_now.append(True)
        try:
            return train_student(*args, **kwargs)
        finally:
            training_now.pop()

    monkeypatch.setattr(training, "evaluation_batches", noted)
    monkeypatch.setattr(training, "train", trained)
    return seen


def check_results(folder, count):
    """Checks that the files of a search agree with one another; returns its trials."""
    rows, folder = trials(folder), folder / "run" / "search"
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert sorted(row["trial"] for row in rows) == [f"{number:04}" for number in range(count)]
    assert {path.name for path in folder.iterdir()} >= {
        "best.yaml", "config.yaml", "environment.yaml", "oracle.json", "search.json", "trials.csv",
    }  # fmt: skip
    for row in rows:
        place = folder / f"trial_{row['trial']}"
        assert len(history(place)) == int(row["epochs"])
        assert float(history(place)[-1]["val_accuracy"]) == pytest.approx(
            float(row["val_accuracy"]), rel=1e-5
        )
        config = yaml.safe_load((place / "config.yaml").read_text())
        assert f"{config['temperature']:g}" == row["temperature"]
    best = yaml.safe_load((folder / "best.yaml").read_text())
    for name in ("temperature", "deep_feature_weight", "weighting", "learning_rate"):
        value = f"{best[name]:g}" if isinstance(best[name], float) else best[name]
        assert value == rows[0][name]
    return rows


@pytest.mark.once
def test_a_search_and_what_it_leaves(tmp_path, capsys, parts, monkeypatch):
    for name, draw in PICTURES.items():
        monkeypatch.setattr(search_pictures, name, draw)
    fingerprint, hashed = vars(ImageDataset)["fingerprint"], []
    compute = fingerprint.func
    monkeypatch.setattr(fingerprint, "func", lambda data: hashed.append(data) or compute(data))
    argv = flags(tmp_path, None, "--tuner", "random", "--max_trials", 3, "--cached_views", 2)
    assert tune.main(argv) == 0
    said = capsys.readouterr().out
    rows = check_results(tmp_path, 3)
    folder = tmp_path / "run" / "search"
    assert {"parameters.png", "progress.png"} <= {path.name for path in folder.iterdir()}
    # Nothing chose on the test set.
    assert set(parts) == {"validation"}
    # No teacher, no student, no checkpoint is left of a trial.
    assert not [path for path in folder.rglob("*") if path.suffix in (".npz", ".keras", ".h5")]
    assert "rank" in said and "best.yaml" in said and "Trial 0002: " in said
    # All trials together look through the images once.
    assert len(hashed) == 1

    assert train.main(["--config", str(folder / "best.yaml")]) == 0
    (metrics,) = folder.glob("best-*/dskd/seed-0/metrics.json")
    assert metrics.parent.parent.parent.name == f"best-{rows[0]['trial']}"
    # Once more: what is finished is shown again.
    capsys.readouterr()
    modified = (folder / "oracle.json").stat().st_mtime_ns
    assert tune.main(argv) == 0
    said = capsys.readouterr().out
    assert "was finished before" in said and "rank" in said
    assert (folder / "oracle.json").stat().st_mtime_ns == modified


@pytest.mark.once
@pytest.mark.slow
def test_a_bayesian_search_over_the_supervised_layers(teacher, tmp_path, parts):
    layers = ["--ranges.student_layers", "[[stage1], [stage1, stage2]]"]
    assert tune.main(flags(tmp_path, teacher, "--max_trials", 3, *layers)) == 0
    rows = check_results(tmp_path, 3)
    assert {row["student_layers"] for row in rows} <= {"stage1", "stage1+stage2"}
    assert set(parts) == {"validation"}


@pytest.mark.once
@pytest.mark.slow
def test_a_promoted_trial_goes_on_where_the_shorter_one_ended(hyperband, tmp_path):
    rows = check_results(hyperband, 4)
    assert sorted(int(row["epochs"]) for row in rows) == [1, 1, 1, 3]
    folder = hyperband / "run" / "search"
    state = json.loads((folder / "oracle.json").read_text())
    (values,) = (
        trial["hyperparameters"]["values"]
        for trial in state["trials"]
        if "tuner/trial_id" in trial["hyperparameters"]["values"]
    )
    shorter = folder / f"trial_{values['tuner/trial_id']}"
    longer = folder / "trial_0003"
    assert history(longer)[:1] == history(shorter) and len(history(longer)) == 3
    # Trained without a break it is the same.
    config = longer / "config.yaml"
    again = ["--config", str(config), "--run_dir", str(tmp_path / "again")]
    assert train.main(again) == 0
    assert history(tmp_path / "again" / "dskd") == history(longer)


@pytest.mark.once
def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(
    teacher, tmp_path, monkeypatch, capsys
):
    train_student, calls = training.train, []

    def fail_twice(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise TrainingError("epoch 1, step 3: the loss is not finite: label_loss=nan.")
        if len(calls) == 2:
            raise MemoryError("out of memory")
        return train_student(*args, **kwargs)

    monkeypatch.setattr(training, "train", fail_twice)
    assert tune.main(flags(tmp_path, teacher, "--tuner", "random", "--max_trials", 3)) == 0
    rows = trials(tmp_path)
    assert [row["trial"] for row in rows] == ["0002", "0000", "0001"]
    assert [row["error"] for row in rows] == [
        "", "epoch 1, step 3: the loss is not finite: label_loss=nan.", "MemoryError: out of memory"
    ]  # fmt: skip
    assert rows[0]["val_accuracy"] and not rows[1]["val_accuracy"]
    assert "Trial 0000 failed: epoch 1, step 3" in capsys.readouterr().out
    assert "MemoryError" in (tmp_path / "run/search/trial_0001/error.txt").read_text()


@pytest.mark.once
def test_too_many_failures_end_the_search_in_one_line(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", fail)
    assert tune.main(flags(tmp_path, teacher, "--max_failures", 2, "--max_trials", 9)) == 1
    assert last_error(capsys).startswith("error: the search stopped: the last 2 trials failed.")
    assert len(trials(tmp_path)) == 2


@pytest.mark.once
@pytest.mark.slow
def test_the_final_run_is_on_all_the_training_images(teacher, tmp_path, capsys):
    more = ("--max_trials", 1, "--final", "--seeds", 0, 1, "--method", "kd")
    assert tune.main(flags(tmp_path, teacher, *more)) == 0
    said = capsys.readouterr().out
    assert "90 training, 10 validation" in said and "100 training, 359 test" in said
    folder = tmp_path / "run" / "search"
    assert len(list(folder.glob("best-0000/kd/seed-*/metrics.json"))) == 2
    # A trial is the mean of its seeds.
    finals = []
    for seed in (0, 1):
        with open(folder / f"trial_0000/seed-{seed}/history.csv", newline="") as file:
            finals.append(float(list(csv.DictReader(file))[-1]["val_accuracy"]))
    assert float(trials(tmp_path)[0]["val_accuracy"]) == pytest.approx(sum(finals) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_trials", "0"], "max_trials: 0 should be a whole number of at least 1."),
        (["--ranges.temperature", "8", "2"], "ranges.temperature: [8.0, 2.0] should be the small"),
        (["--ranges.temperature", "[]"], "ranges.temperature: [] should be two positive numbers"),
        (["--ranges.tempo", "1", "2"], "option: '--ranges.tempo' should be a known name."),
        (["--config", "ranges.yaml"], "ranges: 'tempo' should be a known name."),
        (["--ranges.weighting", "soft"], "ranges.weighting: 'soft' should be a known name."),
        (["--ranges.student_layers", "[[stage7]]"], "student_layers: 'stage7' should be a known"),
        (
            ["--method", "kd", "--ranges.student_layers", "[[stage1]]"],
            "ranges.student_layers: [['stage1']], but method kd supervises no shallow layers.",
        ),
        (["--tuner", "grid"], "tuner: 'grid' should be a known name. Choices: hyperband, bayesi"),
        (["--validation_fraction", "0"], "validation_fraction: 0.0, but a search compares"),
        (["--method", "ce", "--cached_views", "2"], "cached_views: 2, but method ce has no"),
        (["--trial_epochs", "0"], "trial_epochs: 0 should be a whole number of at least 1."),
        (["--chief_timeout", "0"], "chief_timeout: 0.0 should be a positive number."),
        (["--teacher_weights", "none.keras"], "teacher_weights: there is no file 'none.keras'."),
        (
            [f"--ranges.{name}=null" for name in (
                "temperature", "label_weight", "prediction_weight", "deep_prediction_weight",
                "deep_feature_weight", "weighting", "weighting_temperature", "learning_rate",
            )],
            "ranges: nothing is left to search with method dskd.",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_said_in_one_line_before_anything_trains(
    more, message, tmp_path, monkeypatch, capsys
):
    def never(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr(training, "train", never)
    monkeypatch.chdir(tmp_path)
    Path("ranges.yaml").write_text("ranges: {tempo: [1, 2]}")
    assert tune.main(flags(tmp_path, None, *more)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {message}"), error
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_a_folder_belongs_to_one_search(one_trial, teacher, tmp_path, capsys, monkeypatch):
    shutil.copytree(one_trial, tmp_path, dirs_exist_ok=True)
    other = ("--max_trials", 1, "--ranges.temperature", 2, 3)
    assert tune.main(flags(tmp_path, teacher, *other)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "another configuration (ranges.temperature: [1.0, 10.0] there, [2.0, 3.0] here)" in error
    assert tune.main(flags(tmp_path, teacher, "--max_trials", 2)) == 2
    assert "--resume goes on to 2" in capsys.readouterr().err
    assert tune.main(flags(tmp_path, teacher, "--max_trials", 2, "--resume")) == 0
    assert len(trials(tmp_path)) == 2
    # An interrupted one is set aside unless it is resumed.
    (tmp_path / "run" / "search" / "search.json").unlink()
    monkeypatch.setattr(training, "train", fail)
    assert tune.main(flags(tmp_path, teacher, "--max_failures", 1)) == 1
    assert (tmp_path / "run" / "search.unfinished-1" / "oracle.json").exists()
    assert len(trials(tmp_path)) == 1


@pytest.mark.once
def test_only_the_process_that_has_the_folder_writes_there(one_trial, teacher, tmp_path, capsys):
    shutil.copytree(one_trial, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "run" / "search"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with filelock.FileLock(folder.with_name(".search.lock")):
        assert tune.main(flags(tmp_path, teacher, "--max_trials", 1)) == 2
    assert "run_dir: another process is working in" in last_error(capsys)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.once
def test_a_search_that_another_process_has_just_finished_is_shown(
    one_trial, teacher, tmp_path, capsys, monkeypatch
):
    def finish(*_):
        shutil.copytree(one_trial / "run", tmp_path / "run")

    monkeypatch.setattr(trials_module, "load", finish)
    assert tune.main(flags(tmp_path, teacher, "--max_trials", 1)) == 0
    assert "was finished before" in capsys.readouterr().out
    assert not (tmp_path / "run" / "search.unfinished-1").exists()


@pytest.mark.once
def test_a_teacher_below_the_bar_leaves_the_folder_free(teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", fail)
    more = ("--max_failures", 1, "--min_teacher_accuracy")
    assert tune.main(flags(tmp_path, teacher, *more, 1.0)) == 2
    assert "min_teacher_accuracy: the teacher" in capsys.readouterr().err
    assert tune.main(flags(tmp_path, teacher, *more, 0.0)) == 1
    assert "the search stopped" in last_error(capsys)


@pytest.mark.once
def test_ctrl_c_leaves_what_resume_goes_on_from(teacher, tmp_path, monkeypatch):
    train_student, calls = training.train, []

    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_student(*args, **kwargs)

    monkeypatch.setattr(training, "train", interrupt)
    more = ("--tuner", "random", "--max_trials", 2)
    assert tune.main(flags(tmp_path, teacher, *more)) == 130
    assert len(trials(tmp_path)) == 1
    assert tune.main(flags(tmp_path, teacher, *more, "--resume")) == 0
    assert len(trials(tmp_path)) == 2 and len(calls) == 3


@pytest.mark.once
@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_trials(hyperband, teacher, tmp_path):
    """By SIGKILL, seven times in one search of four trials."""
    moments = "saved:1,step:3,trained:1,half:1,ended:1,saved:2,step:8,none"
    more = (*HYPERBAND, "--resume", "--checkpoint_steps", 2)
    script = Path(__file__).parent / "killed_search.py"
    killed = subprocess.run(
        [sys.executable, str(script), moments, *flags(tmp_path, teacher, *more)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == 0, killed.stdout + killed.stderr
    assert "7 killed, then none ended with 0" in killed.stdout
    expected = numbers(hyperband)
    assert numbers(tmp_path) == expected and len(expected) == 4
    for name in expected:
        place = Path("run", "search", f"trial_{name}")
        assert history(tmp_path / place) == history(hyperband / place)


@pytest.mark.once
@pytest.mark.slow
def test_a_worker_is_killed_and_the_search_has_all_trials(teacher, tmp_path, capsys, monkeypatch):
    """A chief and two workers on this machine."""
    replace_dead, killed = workers.Chief.replace_dead, []

    def kill(self):
        # In a trial: one has ended, and there are more than workers.
        ongoing = self.oracle.ongoing_trials
        if "worker-1" in ongoing and self.oracle.ended() and not killed:
            process = self._processes["worker-1"]
            process.send_signal(signal.SIGSTOP)
            # It asks nothing any more, and what it has asked is answered: its trial is this one.
            time.sleep(0.5)
            if (trial := ongoing.get("worker-1")) is None:
                process.send_signal(signal.SIGCONT)
            else:
                killed.append(trial.trial_id)
                process.kill()
                process.wait()
        replace_dead(self)

    monkeypatch.setattr(workers.Chief, "replace_dead", kill)
    more = ("--tuner", "random", "--max_trials", 4, "--workers", 2)
    assert tune.main(flags(tmp_path, teacher, *more)) == 0
    said = capsys.readouterr().out
    assert f"worker-1 is gone (SIGKILL): trial {killed[0]} is to be redone." in said, said
    assert len(re.findall(r"Started worker-1 \(process \d+\)", said)) == 2
    rows = trials(tmp_path)
    assert len(rows) == 4 and all(row["val_accuracy"] for row in rows), said


def worker(monkeypatch, **variables):
    values = {"IP": "127.0.0.1", "PORT": "1", **variables}
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker-1")
    for name, value in values.items():
        monkeypatch.setenv(f"KERASTUNER_ORACLE_{name}", value)


def test_a_worker_without_a_chief_says_so(tmp_path, monkeypatch, capsys):
    worker(monkeypatch)
    assert tune.main(flags(tmp_path, None, "--chief_timeout", "0.3")) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "no chief answers at 127.0.0.1:1 after 0.3 s" in error


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PORT": ""}, "KERASTUNER_ORACLE_PORT: not set."),
        ({"PORT": "here"}, "KERASTUNER_ORACLE_PORT: 'here' should be a port's number."),
    ],
)
def test_a_workers_variables_are_checked(variables, message, tmp_path, monkeypatch, capsys):
    worker(monkeypatch, **variables)
    assert tune.main(flags(tmp_path, None)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {message}")


def test_tensorboards_hparams_page(one_trial):
    """Read back by TensorBoard's own code for that page."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.plugins.hparams import metadata

    folder = one_trial / "run" / "search"

    def read(place, tag):
        events = event_accumulator.EventAccumulator(str(place))
        events.Reload()
        content = events.SummaryMetadata(tag).plugin_data.content
        return events, content

    _, content = read(folder, metadata.EXPERIMENT_TAG)
    experiment = metadata.parse_experiment_plugin_data(content)
    assert "temperature" in [info.name for info in experiment.hparam_infos]
    (metric,) = experiment.metric_infos
    place = folder / "trial_0000" / "seed-0" / "tensorboard"
    _, content = read(place, metadata.SESSION_START_INFO_TAG)
    session = metadata.parse_session_start_info_plugin_data(content)
    assert session.hparams["temperature"].number_value == 4.0
    assert session.hparams["weighting"].string_value == "uniform"
    values = event_accumulator.EventAccumulator(str(place / metric.name.group))
    values.Reload()
    (value,) = values.Scalars(metric.name.tag)
    assert value.value == pytest.approx(float(trials(one_trial)[0]["val_accuracy"]), rel=1e-4)
