"""The search's command, end to end, on few images of digits."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

import train
import tune
from dskd_keras import training
from dskd_keras.errors import TrainingError

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--teacher", "resnet8", "--student", "resnet8", "--dataset", "digits", "--image_size", "8",
    "--train_examples", "100", "--epochs", "1", "--batch_size", "16",
]  # fmt: skip
NO_STATISTICS = ("seconds", "peak_memory_mib")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return tmp_path_factory.mktemp("teachers")


def flags(folder, teachers, *more):
    return [
        *FLAGS, "--run_dir", str(folder / "run"), "--teacher_dir", str(teachers), *map(str, more)
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


@pytest.fixture
def parts(monkeypatch):
    """The parts of the data that trainings evaluate on."""
    seen, training_now = [], []
    evaluation_batches, train_student = training.evaluation_batches, training.train

    def noted(dataset, part):
        seen.extend([part] if training_now else [])
        return evaluation_batches(dataset, part)

    def trained(*args, **kwargs):
        training_now.append(True)
        try:
            return train_student(*args, **kwargs)
        finally:
            training_now.pop()

    monkeypatch.setattr(training, "evaluation_batches", noted)
    monkeypatch.setattr(training, "train", trained)
    return seen


@pytest.mark.once
@pytest.mark.parametrize("tuner", ["random", "bayesian", "hyperband"])
def test_six_trials(tuner, teachers, tmp_path, capsys, parts):
    more = {
        "random": ["--cached_views", 2],
        "bayesian": ["--ranges.student_layers", "[[stage1], [stage1, stage2]]"],
        "hyperband": ["--trial_epochs", 3],
    }[tuner]
    argv = flags(tmp_path, teachers, "--tuner", tuner, "--max_trials", 6, *more)
    assert tune.main(argv) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "run" / "search"
    rows = trials(tmp_path)
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert len(rows) == 6 and accuracies == sorted(accuracies, reverse=True)
    assert {row["trial"] for row in rows} == {f"000{number}" for number in range(6)}
    assert {path.name for path in folder.iterdir()} >= {
        "best.yaml", "config.yaml", "environment.yaml", "oracle.json", "parameters.png",
        "progress.png", "search.json", "trials.csv",
    }  # fmt: skip
    # Nothing chose on the test set.
    assert set(parts) == {"validation"}
    # No teacher, no student, no checkpoint is left of a trial.
    assert not [path for path in folder.rglob("*") if path.suffix in (".npz", ".keras", ".h5")] or (
        tuner == "hyperband"
    )
    for row in rows:
        place = folder / f"trial_{row['trial']}"
        with open(place / "seed-0" / "history.csv", newline="") as file:
            history = list(csv.DictReader(file))
        assert len(history) == int(row["epochs"])
        assert float(history[-1]["val_accuracy"]) == pytest.approx(
            float(row["val_accuracy"]), rel=1e-5
        )
        config = yaml.safe_load((place / "config.yaml").read_text())
        assert f"{config['temperature']:g}" == row["temperature"]
    best = yaml.safe_load((folder / "best.yaml").read_text())
    for name in ("temperature", "deep_feature_weight", "weighting", "learning_rate"):
        value = f"{best[name]:g}" if isinstance(best[name], float) else best[name]
        assert value == rows[0][name]
    assert "rank" in said and "best.yaml" in said and "Trial 0005: " in said

    assert train.main(["--config", str(folder / "best.yaml")]) == 0
    (metrics,) = folder.glob("best-*/dskd/seed-0/metrics.json")
    assert metrics.parent.parent.parent.name == f"best-{rows[0]['trial']}"
    # Once more: what is finished is shown again.
    modified = (folder / "oracle.json").stat().st_mtime_ns
    assert tune.main(argv) == 0
    assert "was finished before" in capsys.readouterr().out
    assert (folder / "oracle.json").stat().st_mtime_ns == modified


@pytest.mark.once
def test_a_promoted_trial_goes_on_where_the_shorter_one_ended(teachers, tmp_path):
    more = ("--tuner", "hyperband", "--max_trials", 4, "--trial_epochs", 3)
    assert tune.main(flags(tmp_path, teachers, *more)) == 0
    folder = tmp_path / "run" / "search"
    state = json.loads((folder / "oracle.json").read_text())
    (values,) = (
        trial["hyperparameters"]["values"]
        for trial in state["trials"]
        if "tuner/trial_id" in trial["hyperparameters"]["values"]
    )
    shorter = folder / f"trial_{values['tuner/trial_id']}"
    longer = folder / "trial_0003"

    def history(place):
        with open(place / "seed-0" / "history.csv", newline="") as file:
            return list(csv.DictReader(file))

    assert history(longer)[:1] == history(shorter) and len(history(longer)) == 3
    # Trained without a break it is the same.
    config = longer / "config.yaml"
    again = ["--config", str(config), "--run_dir", str(tmp_path / "again")]
    assert train.main(again) == 0
    assert history(tmp_path / "again" / "dskd") == history(longer)


@pytest.mark.once
def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(
    teachers, tmp_path, monkeypatch, capsys
):
    assert tune.main(flags(tmp_path / "first", teachers, "--max_trials", 1)) == 0
    train_student, calls = training.train, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise TrainingError("epoch 1, step 3: the loss is not finite: label_loss=nan.")
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return train_student(*args, **kwargs)

    monkeypatch.setattr(training, "train", fail)
    assert tune.main(flags(tmp_path, teachers, "--tuner", "random", "--max_trials", 4)) == 0
    rows = trials(tmp_path)
    errors = [row["error"] for row in rows]
    assert errors == ["", "", errors[2], errors[3]] and rows[2]["val_accuracy"] == ""
    assert {errors[2], errors[3]} == {
        "epoch 1, step 3: the loss is not finite: label_loss=nan.", "MemoryError: out of memory"
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "Trial 0001 failed: epoch 1, step 3" in said
    assert "MemoryError" in (tmp_path / "run/search/trial_0002/error.txt").read_text()


@pytest.mark.once
def test_too_many_failures_end_the_search_in_one_line(teachers, tmp_path, monkeypatch, capsys):
    assert tune.main(flags(tmp_path / "first", teachers, "--max_trials", 1)) == 0

    def fail(*_, **__):
        raise TrainingError("no.")

    monkeypatch.setattr(training, "train", fail)
    capsys.readouterr()
    assert tune.main(flags(tmp_path, teachers, "--max_failures", 2, "--max_trials", 9)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the search stopped: the last 2 trials failed.")
    assert len(trials(tmp_path)) == 2


@pytest.mark.once
def test_the_final_run_is_on_all_the_training_images(teachers, tmp_path, capsys):
    more = ("--max_trials", 1, "--final", "--seeds", 0, 1, "--method", "kd")
    assert tune.main(flags(tmp_path, teachers, *more)) == 0
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
        (["--max_trials", "0"], "max_trials should be at least 1. Received: 0."),
        (["--ranges.temperature", "8", "2"], "ranges.temperature: from 8.0 to 2.0 is the wrong"),
        (["--ranges.temperature", "[]"], "ranges.temperature: [] is empty. Give two positive"),
        (["--ranges.tempo", "1", "2"], "option: unknown name '--ranges.tempo'."),
        (["--ranges", "{tempo: [1, 2]}"], "ranges: unknown name 'tempo'."),
        (["--ranges.weighting", "soft"], "ranges.weighting: unknown name"),
        (["--ranges.student_layers", "[[stage7]]"], "student_layers: unknown name 'stage7'."),
        (["--tuner", "grid"], "tuner: unknown name 'grid'. Choices: hyperband, bayesian, random."),
        (["--validation_fraction", "0"], "validation_fraction: 0.0, but a search compares"),
        (["--method", "ce", "--cached_views", "2"], "cached_views: 2, but method ce has no"),
        (["--trial_epochs", "0"], "trial_epochs should be at least 1"),
        (["--chief_timeout", "0"], "chief_timeout should be a positive number of seconds"),
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
    assert tune.main(flags(tmp_path, tmp_path, *more)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {message}"), error
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_a_folder_belongs_to_one_search(teachers, tmp_path, capsys, monkeypatch):
    assert tune.main(flags(tmp_path, teachers, "--max_trials", 1)) == 0
    capsys.readouterr()
    other = ("--max_trials", 1, "--ranges.temperature", 2, 3)
    assert tune.main(flags(tmp_path, teachers, *other)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "another configuration (ranges.temperature: [1.0, 10.0] there, [2.0, 3.0] here)" in error
    assert tune.main(flags(tmp_path, teachers, "--max_trials", 2)) == 2
    assert "--resume goes on to 2" in capsys.readouterr().err
    assert tune.main(flags(tmp_path, teachers, "--max_trials", 2, "--resume")) == 0
    assert len(trials(tmp_path)) == 2
    # An interrupted one is set aside unless it is resumed.
    (tmp_path / "run" / "search" / "search.json").unlink()
    assert tune.main(flags(tmp_path, teachers, "--max_trials", 1)) == 0
    assert (tmp_path / "run" / "search.unfinished-1" / "oracle.json").exists()


@pytest.mark.once
def test_a_teacher_below_the_bar_leaves_the_folder_free(teachers, tmp_path, capsys):
    more = ("--max_trials", 1, "--min_teacher_accuracy")
    assert tune.main(flags(tmp_path, teachers, *more, 1.0)) == 2
    assert "min_teacher_accuracy: the teacher" in capsys.readouterr().err
    assert tune.main(flags(tmp_path, teachers, *more, 0.0)) == 0


@pytest.mark.once
def test_ctrl_c_leaves_what_resume_goes_on_from(teachers, tmp_path, monkeypatch):
    train_student, calls = training.train, []

    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_student(*args, **kwargs)

    assert tune.main(flags(tmp_path / "first", teachers, "--max_trials", 1)) == 0
    monkeypatch.setattr(training, "train", interrupt)
    more = ("--tuner", "random", "--max_trials", 3)
    assert tune.main(flags(tmp_path, teachers, *more)) == 130
    assert len(trials(tmp_path)) == 1
    assert tune.main(flags(tmp_path, teachers, *more, "--resume")) == 0
    assert len(trials(tmp_path)) == 3 and len(calls) == 4


def run(script, *argv, **environment):
    return subprocess.run(
        [sys.executable, str(script), *argv],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.once
def test_killed_at_any_moment_it_goes_on_to_the_same_trials(tmp_path):
    """By SIGKILL, eight times in one search of four trials."""
    more = ("--tuner", "hyperband", "--max_trials", 4, "--trial_epochs", 3, "--resume",
            "--checkpoint_steps", 2)  # fmt: skip
    script = Path(__file__).parent / "killed_search.py"
    whole = run(script, "none", *flags(tmp_path / "whole", tmp_path, *more))
    assert whole.returncode == 0, whole.stderr
    moments = "saved:1,step:3,trained:1,ended:1,half:1,saved:2,step:2,trained:1,step:5,none"
    killed = run(script, moments, *flags(tmp_path / "killed", tmp_path, *more))
    assert killed.returncode == 0, killed.stdout + killed.stderr
    assert "9 killed, then none ended with 0" in killed.stdout
    expected = numbers(tmp_path / "whole")
    assert numbers(tmp_path / "killed") == expected and len(expected) == 4
    for name in expected:
        assert (tmp_path / f"killed/run/search/trial_{name}/seed-0/history.csv").read_text() == (
            tmp_path / f"whole/run/search/trial_{name}/seed-0/history.csv"
        ).read_text()


@pytest.mark.once
def test_a_worker_is_killed_and_the_search_has_all_trials(tmp_path):
    """A chief and two workers on this machine."""
    argv = flags(tmp_path, tmp_path, "--tuner", "random", "--max_trials", 5, "--workers", 2)
    search = subprocess.Popen(
        [sys.executable, str(ROOT / "tune.py"), *argv],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    limit = threading.Timer(540, search.kill)
    limit.start()
    said, victim, killed = "", None, None
    for line in search.stdout:
        said += line
        if started := re.match(r"Started worker-1 \(process (\d+)\)", line):
            victim = victim or int(started[1])
        # In a trial: one has ended, and there are more than workers.
        if "Trial 000" in line and "so far" in line and killed is None:
            killed = _kill_in_a_trial(tmp_path, victim)
    limit.cancel()
    assert search.wait() == 0, said
    assert killed, said
    assert re.search(r"worker-1 is gone \(SIGKILL\): trial \d{4} is to be redone\.", said), said
    assert said.count("Started worker-1") == 2
    rows = trials(tmp_path)
    assert len(rows) == 5 and all(row["val_accuracy"] for row in rows), said


def _kill_in_a_trial(folder, process):
    """Kills worker-1 once it has a trial; returns the trial's id."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = json.loads((folder / "run" / "search" / "oracle.json").read_text())
        if trial := state["oracle"]["ongoing_trials"].get("worker-1"):
            os.kill(process, signal.SIGKILL)
            return trial
        time.sleep(0.1)
    return None


def worker(monkeypatch, **variables):
    values = {"IP": "127.0.0.1", "PORT": "1", **variables}
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker-1")
    for name, value in values.items():
        monkeypatch.setenv(f"KERASTUNER_ORACLE_{name}", value)


def test_a_worker_without_a_chief_says_so(tmp_path, monkeypatch, capsys):
    worker(monkeypatch)
    assert tune.main(flags(tmp_path, tmp_path, "--chief_timeout", "1")) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "no chief answers at 127.0.0.1:1 after 1 s" in error


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PORT": ""}, "KERASTUNER_ORACLE_PORT: not set."),
        ({"PORT": "here"}, "KERASTUNER_ORACLE_PORT: 'here' should be a port's number."),
    ],
)
def test_a_workers_variables_are_checked(variables, message, tmp_path, monkeypatch, capsys):
    worker(monkeypatch, **variables)
    assert tune.main(flags(tmp_path, tmp_path)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {message}")


def test_tensorboards_hparams_page(teachers, tmp_path):
    """Read back by TensorBoard's own code for that page."""
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.plugins.hparams import metadata

    assert tune.main(flags(tmp_path, teachers, "--max_trials", 1)) == 0
    folder = tmp_path / "run" / "search"

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
    assert session.hparams["weighting"].string_value == "softmax"
    values = event_accumulator.EventAccumulator(str(place / metric.name.group))
    values.Reload()
    (value,) = values.Scalars(metric.name.tag)
    assert value.value == pytest.approx(float(trials(tmp_path)[0]["val_accuracy"]), rel=1e-4)
    shutil.rmtree(folder)
