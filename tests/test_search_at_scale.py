"""Many workers under one chief: what only shows when things happen at the same time."""

import signal

import pytest
from keras_tuner.engine.trial import TrialStatus
from rich.console import Console
from test_tuning import finish, new_oracle, search_config

from dskd_keras.errors import TrainingError
from dskd_keras.tuning import workers
from dskd_keras.tuning.plan import SearchPlan


def new_plan(folder, most=9, **fields):
    return SearchPlan(
        search_config("random", folder / "search", max_trials=most, **fields),
        Console(quiet=True),
    )


@pytest.mark.once
def test_a_trial_that_ends_during_a_report_is_in_the_next(tmp_path, monkeypatch):
    plan = new_plan(tmp_path)
    plan.folder.mkdir()
    first, second = (plan.oracle.create_trial(name) for name in "ab")
    finish(plan.oracle, first)
    read = plan.results

    def meanwhile():
        results = read()
        if second.trial_id not in plan.oracle.end_order:
            # As a worker's request does, in another thread of the chief.
            finish(plan.oracle, second)
        return results

    monkeypatch.setattr(plan, "results", meanwhile)
    plan.report_ended()
    assert list(plan.oracle.unreported) == [second.trial_id]
    plan.report_ended()
    assert not plan.oracle.unreported
    rows = (plan.folder / "trials.csv").read_text().splitlines()[1:]
    assert sorted(row.partition(",")[0] for row in rows) == ["0000", "0001"]


def test_an_end_whose_report_was_dropped_does_not_count(tmp_path):
    oracle = new_oracle("random", tmp_path / "search", most=1)
    trial = oracle.create_trial("a")
    oracle.update_trial(trial.trial_id, {"val_accuracy": 0.5})
    # Thought dead between the two requests that a worker ends a trial with.
    oracle.requeue("a", "no sign of life")
    trial.status = TrialStatus.COMPLETED
    oracle.end_trial(trial)
    assert not oracle.end_order and not oracle.is_over()
    again = oracle.create_trial("b")
    assert again.trial_id == trial.trial_id
    finish(oracle, again)
    assert oracle.end_order == [trial.trial_id] and not oracle.is_over()
    assert oracle.create_trial("b").status == TrialStatus.STOPPED


def test_a_trial_that_ends_late_is_not_done_again(tmp_path):
    oracle = new_oracle("random", tmp_path / "search", most=1)
    trial = oracle.create_trial("a")
    oracle.requeue("a", "no sign of life")
    finish(oracle, trial)
    assert oracle.end_order == [trial.trial_id]
    assert oracle.create_trial("b").status == TrialStatus.STOPPED
    assert oracle.is_over()


class Dead:
    """A worker's process that somebody killed."""

    def poll(self):
        return -signal.SIGKILL


@pytest.mark.once
@pytest.mark.parametrize(("number", "most"), [(1, 6), (2, 6), (8, 24)])
def test_all_workers_may_be_killed_at_once(number, most, tmp_path, monkeypatch):
    plan = new_plan(tmp_path, workers=number)
    plan.folder.mkdir()
    chief, started = workers.Chief(plan, ["worker"]), []
    monkeypatch.setattr(chief, "_start", started.append)
    names = [f"worker-{n}" for n in range(number)]
    for name in names:
        (plan.folder / f"{name}.log").touch()
    rounds = most // number
    for _ in range(rounds - 1):
        chief._processes.update({name: Dead() for name in names})
        chief.replace_dead()
    assert started == names * (rounds - 1)
    # A trial that ends says that workers can work here.
    finish(plan.oracle, plan.oracle.create_trial("a"))
    for _ in range(rounds - 1):
        chief._processes.update({name: Dead() for name in names})
        chief.replace_dead()
    chief._processes.update({name: Dead() for name in names})
    with pytest.raises(TrainingError, match=f"{most} workers died without finishing a trial, the"):
        chief.replace_dead()
