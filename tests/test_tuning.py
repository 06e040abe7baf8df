"""The parts of a search, without training where none is needed."""

import gc
import itertools
import json
import os
import subprocess
import sys

import h5py
import keras
import keras_tuner
import numpy as np
import pytest
from keras_tuner.engine.trial import TrialStatus
from small import convnet, crossentropy, images

import dskd_keras
from dskd_keras import weighting
from dskd_keras.errors import InputError
from dskd_keras.experiment.command_line import parse
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.tuning import DistillationHyperModel, SearchRanges, oracles, ranking
from dskd_keras.tuning.config import SearchConfig
from dskd_keras.tuning.memory import clean_session

TUNERS = ("random", "bayesian", "hyperband")


def hypermodel(ranges=None, **settings):
    settings = {"student_layers": ["stage1", "stage2"], **settings}
    return DistillationHyperModel(
        convnet("teacher", 6), lambda: convnet("student"), ranges=ranges, **settings
    )


# The hypermodel


@pytest.mark.once
def test_values_lie_in_their_ranges_and_reach_the_distiller(tmp_path):
    ranges = SearchRanges(temperature=[2, 3], weighting_temperature=[0.5, 2])
    model = hypermodel(ranges)
    space = keras_tuner.HyperParameters()
    model.declare_hyperparameters(space)
    oracle = oracles.create(search_config("random", tmp_path / "search", max_trials=9), space)
    oracle.save = lambda: None
    seen = set()
    for trial in range(9):
        hp = oracle.create_trial(f"tuner{trial}").hyperparameters
        values = model.values(hp)
        distiller = model.build(hp)
        assert 2 <= values["temperature"] <= 3
        for name in ("temperature", "label_weight", "prediction_weight", "deep_feature_weight"):
            assert getattr(distiller, name) == values[name] == float(f"{values[name]:.4g}")
        strategy = distiller.feature_weighting
        assert type(strategy).__name__.lower() == values["weighting"]
        assert ("weighting_temperature" in values) == (values["weighting"] == "softmax")
        if values["weighting"] == "softmax":
            assert strategy.temperature == values["weighting_temperature"]
        rate = float(keras.ops.convert_to_numpy(distiller.optimizer.learning_rate))
        assert rate == pytest.approx(values["learning_rate"])
        seen.add(values["weighting"])
    assert len(seen) >= 3


def test_the_first_values_are_the_given_ones():
    model = hypermodel(temperature=5.0, weighting="inverse", deep_feature_weight=77.0)
    values = model.values(keras_tuner.HyperParameters())
    assert values["temperature"] == 5.0 and values["weighting"] == "inverse"
    assert values["deep_feature_weight"] == 77.0 and values["learning_rate"] == 0.05
    # What is outside of its range can't be proposed; the middle is.
    assert hypermodel(temperature=40.0).values(keras_tuner.HyperParameters())[
        "temperature"
    ] == pytest.approx(10**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("ranges", "settings", "searched"),
    [
        ({"temperature": [2, 8]}, {}, {"temperature"}),
        (
            {"student_layers": [["stage1"], ["stage2", "stage1"]]},
            {},
            {"student_layers"},
        ),
        ({"weighting": ["uniform", "inverse"]}, {}, {"weighting"}),
        ({"weighting_temperature": [1, 2]}, {"weighting": "uniform"}, set()),
        (
            None,
            {"student_layers": ()},
            {"temperature", "label_weight", "prediction_weight", "learning_rate"},
        ),
        (None, {"student_layers": (), "prediction_weight": 0.0}, {"learning_rate"}),
        (
            {"deep_prediction_weight": [1, 2], "prediction_weight": [1, 2], "label_weight": [1, 2]},
            {"deep_prediction_weight": 0.0},
            {"prediction_weight", "label_weight"},
        ),
        (
            {"temperature": [1, 2], "deep_feature_weight": [1, 2]},
            {"deep_prediction_weight": 0.0, "prediction_weight": 0.0},
            {"deep_feature_weight"},
        ),
    ],
)
def test_only_what_counts_is_searched(ranges, settings, searched):
    assert set(hypermodel(ranges, **settings).values(keras_tuner.HyperParameters())) == searched


def test_layers_are_chosen_as_sets():
    model = hypermodel({"student_layers": [["stage1"], ["stage2", "stage1"]]})
    hp = keras_tuner.HyperParameters()
    model.declare_hyperparameters(hp)
    hp.values["student_layers"] = "stage2, stage1"
    assert model.distiller(hp).student_layers == ("stage2", "stage1")


class Sharpened(weighting.Softmax):
    """With a setting of its own."""

    def __init__(self, power=2.0, **kwargs):
        super().__init__(**kwargs)
        self.power = power

    def get_config(self):
        return {**super().get_config(), "power": self.power}


@pytest.mark.parametrize("given", [Sharpened, type("Softmax", (Sharpened,), {})])
def test_a_subclass_of_softmax_is_kept_and_its_temperature_searched(given):
    strategy = given(power=3.0, temperature=0.5)
    hp = keras_tuner.HyperParameters()
    hp.Fixed("weighting_temperature", 2.0)
    for ranges, temperature in (
        ({"temperature": [2, 8]}, 0.5),
        ({"weighting_temperature": [0.1, 10]}, 2.0),
    ):
        model = hypermodel(ranges, weighting=strategy)
        assert set(model.values(keras_tuner.HyperParameters())) == set(ranges)
        built = model.distiller(hp).feature_weighting
        assert type(built) is given
        assert (built.power, built.temperature) == (3.0, temperature)
    # Where the strategy itself is searched, the choice is one of the built-in ones.
    model = hypermodel({"weighting": ["softmax", "uniform"]}, weighting=strategy)
    built = model.distiller(keras_tuner.HyperParameters()).feature_weighting
    assert type(built) is weighting.Softmax and built.temperature == 0.5


@pytest.mark.once
def test_a_search_of_ones_own(tmp_path):
    x, y = images(24)
    model = hypermodel({"temperature": [2, 8], "learning_rate": [0.001, 0.01]})
    tuner = keras_tuner.RandomSearch(
        model,
        keras_tuner.Objective("val_accuracy", "max"),
        max_trials=2,
        directory=tmp_path,
        seed=3,
    )
    before = [weight.copy() for weight in model.teacher.get_weights()]
    tuner.search(x[:16], y[:16], validation_data=(x[16:], y[16:]), epochs=1, verbose=0)
    trials = tuner.oracle.get_best_trials(2)
    assert [trial.status for trial in trials] == ["COMPLETED"] * 2
    assert trials[0].hyperparameters.values != trials[1].hyperparameters.values
    for a, b in zip(before, model.teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    best = tuner.get_best_models(1)[0]
    assert best.evaluate(x[16:], y[16:], verbose=0, return_dict=True)["accuracy"] == pytest.approx(
        trials[0].score
    )
    # The teacher is not kept with the trials.
    with h5py.File(next(tmp_path.rglob("*.weights.h5"))) as file:
        shapes = []
        file.visititems(lambda name, item: shapes.append(getattr(item, "shape", ())))
    kernels = [tuple(v.shape) for v in model.teacher.variables if len(v.shape) == 4]
    assert kernels and not set(kernels) & set(shapes)


def test_a_search_of_ones_own_needs_validation_data(tmp_path):
    x, y = images(8)
    tuner = keras_tuner.RandomSearch(
        hypermodel({"temperature": [2, 8]}),
        keras_tuner.Objective("val_accuracy", "max"),
        directory=tmp_path,
    )
    with pytest.raises(keras_tuner.errors.FatalError, match="validation_data: not given"):
        tuner.search(x, y, epochs=1, verbose=0)


def test_a_loss_that_is_not_finite_fails_the_trial(tmp_path):
    x, y = images(8)
    x[0] = np.nan
    model = hypermodel({"temperature": [2, 8]})
    distiller = model.build(keras_tuner.HyperParameters())
    with pytest.raises(keras_tuner.errors.FailedTrialError, match="the loss is not finite"):
        model.fit(None, distiller, x, y, validation_data=(x, y), verbose=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranges": {"tempo": [1, 2]}}, "ranges: 'tempo' should be a known name"),
        ({"ranges": {"temperature": [3, 1]}}, r"\[3, 1\] should be the smaller number first"),
        ({"ranges": {"temperature": []}}, r"ranges.temperature: \[\] should be two positive"),
        ({"ranges": {"temperature": [2, 2]}}, r"\[2, 2\] should be a range"),
        ({"ranges": {"temperature": [0, 2]}}, "two positive numbers"),
        ({"ranges": {"temperature": ["a", 2]}}, "two positive numbers"),
        ({"ranges": {"weighting": ["softmax", "foo"]}}, "weighting: 'foo' should be a known name"),
        ({"ranges": {"weighting": ["softmax", "softmax"]}}, "should be different choices"),
        ({"ranges": {"student_layers": ["stage1"]}}, "'stage1' should be a list of layers"),
        ({"temprature": 2}, "argument: 'temprature' should .* Did you mean 'temperature'"),
        ({"learning_rate": 0}, "learning_rate: 0 should be a positive number"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        hypermodel(**arguments)


def test_a_student_is_a_function():
    with pytest.raises(InputError, match=r"student: .* should be a function that returns a"):
        DistillationHyperModel(convnet("teacher"), convnet("student"))


@pytest.mark.once
def test_the_configuration_of_a_search_loads_neither_keras_nor_kerastuner():
    code = "import sys; from dskd_keras.tuning.config import SearchConfig as config"
    code += "; assert config; sys.exit(bool({'keras', 'keras_tuner'} & {*sys.modules}))"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "DSKD_KERAS_DEFER": "1"}
    )


# The oracles


def search_config(tuner, folder, **fields):
    """The folder is the search's own."""
    assert folder.name == "search"
    return SearchConfig("resnet8", "resnet8", tuner=tuner, run_dir=str(folder.parent), **fields)


def new_oracle(tuner, folder, most=9, **fields):
    space = keras_tuner.HyperParameters()
    ranges = {
        "temperature": [1, 10],
        "learning_rate": [0.001, 1.0],
        "weighting": ["softmax", "uniform"],
    }
    DistillationHyperModel(
        None, lambda: None, ranges=ranges, student_layers=["stage1"]
    ).declare_hyperparameters(space)
    folder.mkdir(parents=True, exist_ok=True)
    config = search_config(tuner, folder, max_trials=most, trial_epochs=9, **fields)
    return oracles.create(config, space)


def score(values):
    return 1 / (1 + (np.log(values["temperature"] / 4)) ** 2 + values["learning_rate"])


def go_on(oracle, tuner_id="tuner0", most=100):
    """Runs trials as a tuner would, in no time; returns the ids of those it ran."""
    ran = []
    while len(ran) < most:
        trial = oracle.create_trial(tuner_id)
        if trial.status == TrialStatus.STOPPED:
            break
        assert trial.status == TrialStatus.RUNNING
        ran.append(trial.trial_id)
        finish(oracle, trial)
    return ran


def finish(oracle, trial, status=TrialStatus.COMPLETED):
    if status == TrialStatus.COMPLETED:
        value = score(trial.hyperparameters.values)
        oracle.update_trial(trial.trial_id, {"val_accuracy": value})
    trial.status = status
    oracle.end_trial(trial)


def outcome(oracle):
    return {
        trial.trial_id: (trial.status, trial.score, trial.hyperparameters.values)
        for trial in oracle.ended()
    }


@pytest.mark.once
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_search_killed_at_any_moment_goes_on(tuner, tmp_path, monkeypatch):
    moments = []
    write = dskd_keras.files.write_text

    def remember(path, text):
        moments.append(text)
        write(path, text)

    monkeypatch.setattr("dskd_keras.files.write_text", remember)
    monkeypatch.setattr("os.fsync", lambda file: None)
    # A proposal of the Gaussian process takes seconds.
    most, every = (3, 3) if tuner == "bayesian" else (9, 1)
    whole = new_oracle(tuner, tmp_path / "whole" / "search", most)
    assert len(go_on(whole)) == len(outcome(whole)) == most
    expected, moments = outcome(whole), list(moments)
    assert len(moments) >= 2 * most
    for number, state in list(enumerate(moments))[::every]:
        folder = tmp_path / f"killed-{number}" / "search"
        folder.mkdir(parents=True)
        (folder / "oracle.json").write_text(state)
        again = new_oracle(tuner, folder, most)
        assert again.reload()
        done = outcome(again)
        ran = go_on(again)
        # None is repeated, none is lost, and they are what they would have been.
        assert not set(ran) & set(done) and len(ran) == len(set(ran)) == most - len(done)
        assert outcome(again) == expected


@pytest.mark.once
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_search_proposes_nothing_twice_and_begins_with_the_configuration(tuner, tmp_path):
    oracle = new_oracle(tuner, tmp_path / "search", most=4 if tuner == "bayesian" else 12)
    go_on(oracle)
    first = oracle.trials["0000"].hyperparameters.values
    assert (first["temperature"], first["learning_rate"]) == (4.0, 0.05)
    proposals = [
        tuple(str(trial.hyperparameters.values[name]) for name in ("temperature", "learning_rate"))
        for trial in oracle.trials.values()
        if "tuner/trial_id" not in trial.hyperparameters.values
    ]
    assert len(set(proposals)) == len(proposals)


def test_more_trials_go_on_where_a_finished_search_ended(tmp_path):
    go_on(new_oracle("random", tmp_path / "search", most=4))
    more = new_oracle("random", tmp_path / "search", most=7)
    more.reload()
    assert go_on(more) == ["0004", "0005", "0006"]


def test_hyperband_takes_brackets_that_the_trials_are_enough_for(tmp_path):
    # Of nine epochs KerasTuner's first bracket has thirteen trials.
    for most, expected in ((6, [9] * 6), (10, [3] * 5 + [9] * 5)):
        oracle = new_oracle("hyperband", tmp_path / f"{most}" / "search", most=most)
        go_on(oracle)
        trials = [trial.hyperparameters.values for _, trial in sorted(oracle.trials.items())]
        assert sorted(values["tuner/epochs"] for values in trials) == expected
        promoted = [values for values in trials if "tuner/trial_id" in values]
        assert [values["tuner/initial_epoch"] for values in promoted] == [3, 3][: most - 8]


def test_a_dead_workers_trial_goes_to_another(tmp_path):
    oracle = new_oracle("random", tmp_path / "search", most=2)
    first, second = oracle.create_trial("a"), oracle.create_trial("b")
    finish(oracle, second)
    # There may be something to redo as long as others run.
    assert oracle.create_trial("b").status == TrialStatus.IDLE
    assert not oracle.is_over()
    assert oracle.requeue("a", "SIGKILL") == first.trial_id
    again = oracle.create_trial("b")
    assert again.trial_id == first.trial_id
    assert again.hyperparameters.values == first.hyperparameters.values
    # The one that was thought dead comes after all, and the other one later.
    oracle.update_trial(first.trial_id, {"val_accuracy": 0.5})
    first.status = TrialStatus.COMPLETED
    oracle.end_trial(first)
    oracle.update_trial(first.trial_id, {"val_accuracy": 0.9})
    oracle.end_trial(again)
    assert oracle.trials[first.trial_id].score == 0.5
    assert len(oracle.end_order) == 2
    assert oracle.create_trial("b").status == TrialStatus.STOPPED
    assert oracle.is_over()


def test_a_worker_is_unresponsive_without_a_sign_of_life(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    oracle = new_oracle("random", tmp_path / "search")
    trials = [oracle.create_trial(name) for name in ("a", "b")]
    now[0] = 50
    oracle.get_trial(trials[0].trial_id)
    now[0] = 70
    assert oracle.unresponsive_workers(60) == ["b"]
    now[0] = 120
    assert oracle.unresponsive_workers(60) == ["a", "b"]


def test_a_trial_that_kills_its_process_again_and_again_has_failed(tmp_path):
    folder = tmp_path / "search"
    new_oracle("random", folder).create_trial("tuner0")
    for _ in range(2):
        oracle = new_oracle("random", folder)
        oracle.reload()
        assert oracle.create_trial("tuner0").trial_id == "0000"
    oracle = new_oracle("random", folder)
    oracle.reload()
    assert oracle.create_trial("tuner0").trial_id == "0001"
    (failed,) = oracle.ended()
    assert failed.status == TrialStatus.FAILED and "3 times before its first" in failed.message


def test_a_trial_with_a_checkpoint_may_die_as_often_as_it_likes(tmp_path):
    folder = tmp_path / "search"
    new_oracle("random", folder).create_trial("tuner0")
    for _ in range(6):
        checkpoints = folder / "trial_0000" / "seed-0" / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / f"step-000000001.{32 * '0'}.npz").touch()
        oracle = new_oracle("random", folder)
        oracle.reload()
        assert oracle.create_trial("tuner0").trial_id == "0000"


def test_failures_are_recorded_and_too_many_in_a_row_end_the_search(tmp_path):
    oracle = new_oracle("random", tmp_path / "search", max_failures=4)
    for _ in range(3):
        finish(oracle, oracle.create_trial("tuner0"), TrialStatus.FAILED)
    go_on(oracle, most=1)
    assert oracle.failure is None
    for _ in range(4):
        finish(oracle, oracle.create_trial("tuner0"), TrialStatus.FAILED)
    assert oracle.failure == "the last 4 trials failed"
    assert oracle.create_trial("tuner0").status == TrialStatus.STOPPED
    assert len(oracle.ended()) == 8 and oracle.ended()[0].status == TrialStatus.COMPLETED


@pytest.mark.once
def test_a_bayesian_search_leaves_the_place_of_a_failed_trial(tmp_path):
    oracle = new_oracle("bayesian", tmp_path / "search", most=15)
    go_on(oracle, most=6)
    found = []
    for _ in range(4):
        trial = oracle.create_trial("tuner0")
        found.append(np.log([trial.hyperparameters.values[n] for n in ("temperature",
                     "learning_rate")]) / np.log([10, 1000]))  # fmt: skip
        finish(oracle, trial, TrialStatus.FAILED)
    # Of a range of 1.
    apart = [np.abs(a - b).max() for a, b in itertools.pairwise(found)]
    assert min(apart) > 0.05, found


def test_a_full_disk_ends_the_search(tmp_path, monkeypatch):
    oracle = new_oracle("random", tmp_path / "search")
    trial = oracle.create_trial("tuner0")

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dskd_keras.files.write_text", full)
    finish(oracle, trial)
    assert "No space left" in oracle.failure
    assert oracle.create_trial("tuner0").status == TrialStatus.STOPPED


# The results


def test_best_yaml_is_a_configuration_of_train(tmp_path):
    config = search_config("random", tmp_path / "search", trial_epochs=3, epochs=50)
    values = {"temperature": 2.5, "weighting": "inverse", "student_layers": ["stage2"]}
    best = ranking.TrialResult("0004", values, 0.875, epochs=3)
    ranking.write_best(tmp_path / "best.yaml", config, best)
    read = parse(ExperimentConfig, ["--config", str(tmp_path / "best.yaml")], "train.py")
    assert (read.temperature, read.weighting, read.student_layers) == (2.5, "inverse", ["stage2"])
    # The whole training, on all of its images, in a folder where nothing else is.
    assert (read.epochs, read.validation_fraction) == (50, 0.0)
    assert read.run_dir == str(tmp_path / "search" / "best-0004")


def test_the_first_trials_memory_is_all_that_is_taken(tmp_path):
    """TensorFlow keeps what `fit` traces, unless its registry is emptied."""
    x, y = images(2)
    teacher = convnet("teacher", batch_norm=False)

    def trial():
        student = convnet("student", batch_norm=False)
        distiller = dskd_keras.Distiller(teacher, student, ["stage2"])
        distiller.compile("sgd", loss=crossentropy(), jit_compile=keras.backend.backend() == "jax")
        distiller.fit(x, y, verbose=0)

    counts = []
    for _ in range(3):
        with clean_session():
            trial()
        counts.append(len(gc.get_objects()))
    # Without it TensorFlow leaves thousands of objects a trial; JAX keeps some small caches.
    assert counts[2] - counts[1] < 600, counts


def test_a_damaged_state_is_said_in_one_line(tmp_path):
    folder = tmp_path / "search"
    new_oracle("random", folder).create_trial("tuner0")
    path = folder / "oracle.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"oracle.json' is damaged"):
        new_oracle("random", folder).reload()


def test_a_search_that_failed_waits_for_nobody(tmp_path):
    oracle = new_oracle("random", tmp_path / "search", max_failures=1)
    oracle.create_trial("a")
    finish(oracle, oracle.create_trial("b"), TrialStatus.FAILED)
    oracle.requeue("a", "SIGKILL")
    assert oracle.create_trial("c").trial_id == "0000"
    oracle.requeue("c", "SIGKILL")
    oracle.requeue("b")
    assert oracle.failure and oracle.is_over()


def test_the_state_is_plain_json(tmp_path):
    oracle = new_oracle("hyperband", tmp_path / "search")
    go_on(oracle, most=2)
    state = json.loads((tmp_path / "search" / "oracle.json").read_text())
    assert [trial["status"] for trial in state["trials"]] == ["COMPLETED"] * 2


def test_layers_of_a_search_may_be_one_name_or_auto():
    for given, expected in (("stage1", ("stage1",)), ("auto", ("stage1", "stage2"))):
        hypermodel = DistillationHyperModel(
            convnet("teacher"),
            lambda: convnet("student"),
            ranges={"student_layers": [[given], ["stage1", "stage2"]]},
            student_layers=given,
        )
        distiller = hypermodel.distiller(keras_tuner.HyperParameters())
        assert distiller.student_layers == expected
