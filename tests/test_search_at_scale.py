"""Many workers under one chief: what only shows when things happen at the same time."""

import pytest
from rich.console import Console
from test_tuning import finish, search_config

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
