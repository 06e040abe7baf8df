"""Many workers under one chief: what only shows when things happen at the same time."""

import json
import signal
import threading
from concurrent import futures

import grpc
import pytest
from keras_tuner.engine.trial import TrialStatus
from rich.console import Console
from test_tuning import finish, new_oracle, search_config

from benchmarks import search_at_scale
from benchmarks.search_at_scale import Search, check
from benchmarks.sleeping_trials import Stand
from dskd_keras.errors import TrainingError
from dskd_keras.tuning import keras_tuner_internals, oracles, trials, workers
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


@pytest.mark.once
def test_nobody_waits_for_a_proposal_that_is_made_for_another(tmp_path, monkeypatch):
    plan = new_plan(tmp_path)
    plan.folder.mkdir()
    chief = workers.Chief(plan, ["worker"])
    first = plan.oracle.create_trial("a")
    begun, may_end = threading.Event(), threading.Event()
    propose = plan.oracle.populate_space

    def slowly(trial_id):
        begun.set()
        assert may_end.wait(60)
        return propose(trial_id)

    monkeypatch.setattr(plan.oracle, "populate_space", slowly)
    monkeypatch.setattr(oracles, "_WAIT", 0.01)
    monkeypatch.setenv("KERASTUNER_ORACLE_IP", "127.0.0.1")
    monkeypatch.setenv("KERASTUNER_ORACLE_PORT", str(chief._port))
    monkeypatch.setenv("KERASTUNER_TUNER_ID", "worker-1")
    client = keras_tuner_internals.oracle_client.OracleClient(plan.oracle)
    chief._server.start()
    with futures.ThreadPoolExecutor() as pool:
        try:
            asked = pool.submit(client.create_trial, "b")
            assert begun.wait(60)
            others = [
                pool.submit(client.create_trial, "c"),
                pool.submit(client.get_trial, first.trial_id),
            ]
            idle, known = (other.result(timeout=20) for other in others)
            assert idle.status == TrialStatus.IDLE and not asked.done()
            assert known.trial_id == first.trial_id
        finally:
            may_end.set()
        assert asked.result().status == TrialStatus.RUNNING
        assert client.create_trial("c").trial_id not in (first.trial_id, asked.result().trial_id)
    chief._server.stop(None).wait()


@pytest.mark.once
def test_a_result_that_can_not_be_reported_is_no_failed_trial(tmp_path, monkeypatch):
    plan = new_plan(tmp_path)
    plan.folder.mkdir()
    tuner = trials.Trials(plan, Stand(plan.config, plan.console), None)

    def unanswered(*_, **__):
        raise grpc.RpcError

    monkeypatch.setattr(workers, "role", lambda: "worker")
    monkeypatch.setattr(tuner, "run_trial", lambda trial: {"val_accuracy": 0.5})
    monkeypatch.setattr(plan.oracle, "update_trial", unanswered)
    with pytest.raises(TrainingError, match="the chief no longer answers"):
        tuner.search()
    assert not plan.oracle.end_order and len(plan.oracle.ongoing_trials) == 1


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


@pytest.mark.once
def test_what_a_trial_left_is_read_once_and_a_late_file_too(tmp_path, monkeypatch):
    plan = new_plan(tmp_path)
    plan.folder.mkdir()
    trial = plan.oracle.create_trial("a")
    finish(plan.oracle, trial)
    folder = plan.config.trial_folder(trial.trial_id)
    folder.mkdir()

    def seconds():
        (result,) = plan.results()
        return result.seconds

    # On a disk that several machines share it may come later than the report.
    assert seconds() is None
    (folder / "result.json").write_text('{"seconds": 2.0}')
    assert seconds() == 2.0
    (folder / "result.json").unlink()
    assert seconds() == 2.0


@pytest.mark.once
@pytest.mark.slow
def test_workers_killed_at_known_moments_lose_and_double_nothing(tmp_path):
    """A chief and two workers whose trials sleep, each a process of its own."""
    deaths = {"0000": "reported", "0001": "ended"}
    with Search(tmp_path, 2, "random", 4, 0.1, deaths) as search:
        search.wait(100)
        found = check(search, 4)
    assert not found["wrong"], search.said()
    events, names = search.events(), [f"{number:04}" for number in range(4)]

    def times(what):
        return [sum(e["what"] == what and e["trial"] == name for e in events) for name in names]

    # What was only reported is done again, what had ended is not.
    assert times("given") == times("begun") == [2, 1, 1, 1]
    assert times("ended") == [1, 1, 1, 1]
    assert {path.name for path in search.journals.glob("died-*")} == {"died-0000", "died-0001"}

    # The check sees what it is for.
    (journal,) = search.journals.glob("chief.*")
    with open(journal, "a") as file:
        for what, trial in (("given", "0007"), ("given", "0001"), ("ended", "0000")):
            event = {"what": what, "time": 9e9, "trial": trial, "worker": "worker-1"}
            file.write(json.dumps(event) + "\n")
    assert check(search, 4)["wrong"] == [
        "lost: ['0007']",
        "a trial's end counted twice",
        "worked at after their end: ['0001']",
    ]


def test_the_estimate_adds_what_a_trial_and_the_signs_of_life_cost():
    result = {
        "signs of life": {"chief CPU milliseconds a request": 1.0},
        "proposals": [{"seconds": 2.0}, {"seconds": 1.0}],
        "records": [{"trials": 10, "save": 0.01, "report": 0.006}],
    }
    row = search_at_scale._estimate(result)["rows"][0]
    assert row["minutes a trial"] == 1
    # Four requests, three times saving and a report are 40 ms a minute; a sign of life every 5 s.
    assert row["random"]["workers at most"] == int(1 / (0.040 / 60 + 0.001 / 5))
    assert row["bayesian"]["workers at most"] == int(1 / (2.040 / 60 + 0.001 / 5))
