"""Whether a search loses trials while its workers are killed, and what its chief costs.

    python -m benchmarks.search_at_scale --workers 16 --minutes 3

A real chief with real workers on this machine, whose trials sleep (`benchmarks.sleeping_trials`).

1. Workers are killed at random by SIGKILL, one at a time and now and then half of them at once.
   When the search is over its files are compared with what its processes noted.
2. Nobody is killed: what the chief costs by the number of workers.
3. One process: what a proposal, saving and reporting cost by the number of trials so far.

From 2 and 3 follows what a chief of 1,000 workers would have to do; see `_estimate`.
"""

import collections
import csv
import functools
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from pathlib import Path
from typing import Literal

import psutil
import threadpoolctl
import yaml
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from benchmarks import timing

_ROOT = Path(__file__).parent.parent
# In every process: a backend that is imported fast, and none of its threads.
_ENVIRONMENT = {"KERAS_BACKEND": "numpy", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_SEARCH = ["--teacher", "resnet8", "--student", "resnet8", "--dataset", "digits"]
# Seconds in which a search without a trial that ends, or with dead workers alone, is given up.
_STUCK = 120.0
# What a worker asks once a trial; it also sends a sign of life, a `get_trial`, every 5 s.
_ONCE = ("create_trial", "get_trial", "update_trial", "end_trial")
_SIGN_OF_LIFE = 5.0


def main(
    workers: PositiveInt = 16,
    minutes: NonNegativeFloat = 3.0,
    tuner: Literal["random", "bayesian", "hyperband"] = "random",
    trials: PositiveInt = 600,
    seconds: PositiveFloat = 4.0,
    kill_every: PositiveFloat = 8.0,
    seed: NonNegativeInt = 0,
    load: tuple[PositiveInt, ...] = (1, 4, 16),
    load_trials: PositiveInt = 8,
    load_seconds: PositiveFloat = 6.0,
    proposals: tuple[PositiveInt, ...] = (10, 30, 100, 300),
    records: tuple[PositiveInt, ...] = (100, 1000, 10000),
    json_file: str | None = None,
):
    """Kills workers, then measures the chief.

    Args:
        workers: Workers of the search that is killed at.
        minutes: How long workers are killed; 0 leaves this part out.
        tuner: Of that search.
        trials: Of that search.
        seconds: Mean length of its trials.
        kill_every: Mean seconds from one kill to the next, drawn from an exponential distribution.
        seed: Of the kills' times and victims.
        load: Numbers of workers to measure the chief's load with.
        load_trials: Trials a worker there.
        load_seconds: Mean length of those trials.
        proposals: Numbers of trials after which a proposal of the Bayesian optimisation is timed.
        records: Numbers of trials with which saving and reporting are timed.
        json_file: Where to write the results too.
    """
    command = shlex.join(["python", "-m", "benchmarks.search_at_scale", *sys.argv[1:]])
    result = {"command": command, **timing.machine(), "seed": seed}
    if minutes:
        arguments = (workers, minutes, tuner, trials, seconds, kill_every, seed)
        result["killed"] = _killed(*arguments)
        print(json.dumps(result["killed"], indent=1), flush=True)
    result["load"] = []
    for number in load:
        result["load"].append(_load(number, load_trials, load_seconds))
        print(json.dumps(result["load"][-1]), flush=True)
    if load:
        result["signs of life"] = _signs_of_life()
    result["proposals"] = [_proposal(number) for number in proposals]
    result["records"] = [_records(number) for number in records]
    if load and proposals and records:
        result["estimate"] = _estimate(result)
    print(table(result))
    timing.write_json(json_file, result)
    if json_file is not None:
        Path(json_file).with_suffix(".md").write_text(table(result))
    wrong = result.get("killed", {}).get("wrong")
    if wrong:
        raise SystemExit("\n".join(wrong))


class Search:
    """A search of sleeping trials in processes of its own; a context, which ends them."""

    def __init__(self, folder, workers, tuner, trials, seconds, deaths=None):
        # Here, since it imports Keras.
        from benchmarks import sleeping_trials

        self.folder, self.journals = Path(folder) / "search", Path(folder) / "journals"
        argv = [
            *_SEARCH, "--run_dir", str(folder), "--workers", str(workers), "--tuner", tuner,
            "--max_trials", str(trials),
        ]  # fmt: skip
        self._command = sleeping_trials.command(self.journals, seconds, deaths or {}, argv)
        self._log = Path(folder) / "chief.log"

    def __enter__(self):
        environment = {**os.environ, **_ENVIRONMENT}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "wb") as log:
            self.chief = psutil.Popen(
                self._command, cwd=_ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log,
            )  # fmt: skip
        return self

    def __exit__(self, *_):
        left = [self.chief, *self.workers()]
        for process in left:
            if process.is_running():
                process.kill()
        psutil.wait_procs(left)

    def workers(self):
        """Returns the workers that are alive."""
        try:
            return [p for p in self.chief.children() if p.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []

    def is_over(self):
        """Returns whether the chief has ended."""
        return self.chief.poll() is not None

    def said(self):
        """Returns what the chief has printed."""
        return self._log.read_text(errors="replace")

    def events(self):
        """Returns what the processes noted, in the order of time."""
        lines = []
        for path in self.journals.glob("*.jsonl"):
            name = path.name.split(".")[0]
            for line in path.read_text().splitlines():
                lines.append({"process": name, **json.loads(line)})
        return sorted(lines, key=lambda line: line["time"])

    def wait(self, seconds):
        """Waits for its end; `TimeoutError` with what it said after so long without one."""
        try:
            self.chief.wait(seconds)
        except psutil.TimeoutExpired:
            raise TimeoutError(f"no end after {seconds:g} s:\n{self.said()}") from None


def check(search, trials):
    """Compares the files of a search that has ended with what its processes noted.

    Args:
        search: A `Search`.
        trials: How many it should have.

    Returns:
        What was found, and under `wrong` a line for everything that should not be so.
    """
    events, wrong = search.events(), []
    given, begun, ended = (
        collections.Counter(e["trial"] for e in events if e["what"] == what)
        for what in ("given", "begun", "ended")
    )
    done = {e["trial"]: e for e in events if e["what"] == "done"}
    state = json.loads((search.folder / "oracle.json").read_text())
    saved = {trial["trial_id"]: trial for trial in state["trials"]}
    completed = [name for name, trial in saved.items() if trial["status"] == "COMPLETED"]
    order, run_times = state["oracle"]["end_order"], state["oracle"]["run_times"]
    path = search.folder / "trials.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))

    def expect(holds, text):
        if not holds:
            wrong.append(text)

    expect(search.chief.poll() == 0, f"the chief ended with {search.chief.poll()}")
    expect(len(completed) == trials, f"{len(completed)} trials completed, not {trials}")
    expect(len(saved) == len(state["trials"]), "a trial is twice in oracle.json")
    lost = sorted({*given, *begun} - {*completed})
    expect(not lost, f"lost: {lost}")
    expect(sorted(order) == sorted(completed), "end_order is not of the completed trials, once")
    expect({*ended.values()} == {1} == {*run_times.values()}, "a trial's end counted twice")
    expect(sorted(row["trial"] for row in rows) == sorted(completed), "trials.csv has others")
    over, again = set(), set()
    for event in events:
        if event["what"] == "ended":
            over.add(event["trial"])
        elif event["what"] in ("given", "begun") and event["trial"] in over:
            again.add(event["trial"])
    expect(not again, f"worked at after their end: {sorted(again)}")
    values = [json.dumps(done[name]["values"]) for name in completed if name in done]
    expect(len({*values}) == len(completed), "two trials had the same values")
    for name in completed:
        score = saved[name]["score"]
        expect(
            name in done and abs(score - done[name]["accuracy"]) < 1e-6,
            f"trial {name} has the score {score}, its worker reported another",
        )
    best = max(done.values(), key=lambda event: event["accuracy"])
    expect(rows and rows[0]["trial"] == best["trial"], f"the best is {best['trial']}")
    written = yaml.safe_load((search.folder / "best.yaml").read_text())
    expect(
        all(written[name] == value for name, value in best["values"].items()),
        "best.yaml has other values than the best trial",
    )
    return {
        "trials completed": len(completed),
        "trials given": sum(given.values()),
        "trials given more than once": sum(count > 1 for count in given.values()),
        "trials begun more than once": sum(count > 1 for count in begun.values()),
        "best trial": best["trial"],
        "wrong": wrong,
    }


def _killed(workers, minutes, tuner, trials, seconds, kill_every, seed):
    draw, kills, bursts, memory = random.Random(seed), 0, 0, 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        Search(folder, workers, tuner, trials, seconds) as search,
    ):
        _wait_for_workers(search, workers)
        memory = sum(p.memory_full_info().pss for p in search.workers()) / 2**20
        begin, next_kill = time.monotonic(), 0.0
        known, last_end = 0, begin
        while not search.is_over():
            time.sleep(0.2)
            now = time.monotonic()
            ends = sum(e["what"] == "ended" for e in _chiefs(search))
            if ends > known:
                known, last_end = ends, now
            if now - last_end > _STUCK:
                break
            if now - begin > 60 * minutes or now - begin < next_kill:
                continue
            next_kill = now - begin + draw.expovariate(1 / kill_every)
            alive = sorted(search.workers(), key=lambda process: process.pid)
            # One in ten times a machine goes down, with half of all workers.
            together = max(workers // 2, 1) if draw.random() < 0.1 else 1
            bursts += together > 1
            for process in draw.sample(alive, min(together, len(alive))):
                process.kill()
                kills += 1
        lasted = time.monotonic() - begin
        stuck = [] if search.is_over() else [f"no trial ended for {_STUCK:g} s"]
        said = search.said()
        found = {"wrong": ["no trial was saved"]}
        if (search.folder / "trials.csv").is_file():
            found = check(search, trials)
        found["wrong"] = stuck + found["wrong"]
        if found["wrong"]:
            found["wrong"] += said.strip().splitlines()[-3:]
        asked = [e for e in search.events() if e["what"] == "asked"]
        return {
            "workers": workers, "tuner": tuner, "trials": trials, "seconds a trial": seconds,
            "minutes of kills": minutes, "mean seconds between kills": kill_every,
            "kills": kills, "kills of half the workers": bursts, "seconds": lasted,
            "workers started": said.count("Started worker-"),
            "failed": said.count(" failed: "),
            "memory of all workers, MiB": memory,
            "slowest answer, seconds": max((e["seconds"] for e in asked), default=None),
            **found,
        }  # fmt: skip


def _chiefs(search):
    (path,) = search.journals.glob("chief.*.jsonl")
    for line in path.read_text().splitlines():
        yield json.loads(line)


def _wait_for_workers(search, workers):
    """Waits until all have been given a trial; returns when, as the journals have it."""
    begin = time.monotonic()
    while time.monotonic() - begin < 10 * _STUCK:
        events = [e for e in search.events() if e["what"] == "given"]
        if len({e["worker"] for e in events}) >= workers:
            return
        if search.is_over():
            break
        time.sleep(0.5)
    raise TimeoutError(f"not all workers were given a trial:\n{search.said()}")


def _load(workers, trials, seconds):
    with (
        tempfile.TemporaryDirectory() as folder,
        Search(folder, workers, "random", workers * trials, seconds) as search,
    ):
        search.wait(20 * trials * seconds + _STUCK)
        found, events = check(search, workers * trials), search.events()
    if found["wrong"]:
        raise RuntimeError("; ".join(found["wrong"]))
    chiefs = [e for e in events if e["process"] == "chief"]
    first = {}
    for event in chiefs:
        first.setdefault(event.get("worker"), event)
    # From when the last worker has come to when the first finds no more trials.
    begin = max((first[name] for name in first if name), key=lambda event: event["time"])
    end = [e for e in chiefs if e["what"] == "given"][-1]
    window = [e for e in events if begin["time"] < e["time"] <= end["time"]]
    asked = [e for e in window if e["what"] == "asked"]
    ended = sum(e["what"] == "ended" for e in window)
    cpu, lasted = end["cpu"] - begin["cpu"], end["time"] - begin["time"]
    latency = sorted(e["seconds"] for e in asked)
    return {
        "workers": workers, "trials": ended, "requests": len(asked), "seconds": lasted,
        "requests a second": len(asked) / lasted,
        "chief CPU seconds": cpu, "chief CPU share": cpu / lasted,
        "chief CPU milliseconds a trial": 1000 * cpu / ended,
        "chief CPU milliseconds a request": 1000 * cpu / len(asked),
        "latency, milliseconds, median": 1000 * statistics.median(latency),
        "latency, milliseconds, 95 %": 1000 * latency[int(0.95 * len(latency))],
        "by request": {
            name: 1000 * statistics.median(e["seconds"] for e in asked if e["request"] == name)
            for name in _ONCE
        },
    }  # fmt: skip


def _signs_of_life(requests=2000, threads=16):
    """What a sign of life costs the chief, and how many of them it answers a second at most."""
    from dskd_keras.tuning import keras_tuner_internals

    with (
        tempfile.TemporaryDirectory() as folder,
        Search(folder, 1, "random", 1, 10 * _STUCK) as search,
    ):
        _wait_for_workers(search, 1)
        (worker,) = search.workers()
        variables = {k: v for k, v in worker.environ().items() if k.startswith("KERASTUNER_")}
        os.environ |= variables
        client = keras_tuner_internals.oracle_client.OracleClient(None)
        for name in variables:
            del os.environ[name]
        client.get_trial("0000")
        before, begin = search.chief.cpu_times(), time.perf_counter()
        with futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(client.get_trial, ["0000"] * requests))
        lasted, after = time.perf_counter() - begin, search.chief.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return {
        "requests": requests, "threads": threads, "requests a second": requests / lasted,
        "chief CPU milliseconds a request": 1000 * cpu / requests,
    }  # fmt: skip


def _plan(folder, tuner, trials):
    """Returns the plan of a search with so many completed trials, saved nowhere yet."""
    from rich.console import Console

    from benchmarks import sleeping_trials
    from dskd_keras.experiment.command_line import parse
    from dskd_keras.tuning.config import SearchConfig
    from dskd_keras.tuning.plan import SearchPlan

    argv = [*_SEARCH, "--run_dir", folder, "--tuner", tuner, "--max_trials", str(2 * trials + 2)]
    config = parse(SearchConfig, argv, "benchmarks.search_at_scale")
    plan = SearchPlan(config, Console(quiet=True))
    plan.folder.mkdir(parents=True)
    save, plan.oracle.save = plan.oracle.save, lambda: None
    # Of these trials none is proposed by the model, which takes minutes.
    plan.oracle.num_initial_points = trials
    for _ in range(trials):
        trial = plan.oracle.create_trial("worker-1")
        reported = sleeping_trials.accuracy(trial.hyperparameters.values)
        plan.oracle.update_trial(trial.trial_id, {"val_accuracy": reported})
        trial.status = "COMPLETED"
        plan.oracle.end_trial(trial)
    plan.oracle.save = save
    return plan


def _seconds(work):
    """Returns the processor seconds of some work."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def _proposal(trials):
    with tempfile.TemporaryDirectory() as folder, threadpoolctl.threadpool_limits(1):
        oracle = _plan(folder, "bayesian", trials).oracle
        oracle.save = lambda: None
        # Each is another fit, and takes its own number of steps.
        names = ("worker-2", "worker-3", "worker-4")
        seconds = [_seconds(functools.partial(oracle.create_trial, name)) for name in names]
    return {"trials": trials, "seconds": statistics.median(seconds), "each": seconds}


def _records(trials):
    with tempfile.TemporaryDirectory() as folder:
        plan = _plan(folder, "random", trials)
        for name in plan.oracle.end_order:
            place = plan.config.trial_folder(name)
            place.mkdir()
            (place / "result.json").write_text('{"epochs": 1, "seconds": 1.0}\n')
        saving = statistics.median(_seconds(plan.oracle.save) for _ in range(3))
        # As in a search: one trial has ended since the last report.
        plan.report_ended()
        plan.oracle.unreported.append(plan.oracle.end_order[-1])
        reporting = _seconds(plan.report_ended)
        size = (plan.folder / "oracle.json").stat().st_size
    return {"trials": trials, "save": saving, "report": reporting, "bytes": size}


def _estimate(result):
    """On paper, from the figures of this run: how many workers keep a chief's one core busy.

    A trial costs the chief four requests, three times saving (where it is handed out, and twice at
    its end), one report, and with Bayesian optimisation a proposal; a worker sends a sign of life
    every 5 s. A request by itself is taken to cost what a sign of life does. Python runs one thread
    at a time, so all of that shares one core. What a proposal costs is the most that was measured.
    """
    request = result["signs of life"]["chief CPU milliseconds a request"] / 1000
    proposal = max(row["seconds"] for row in result["proposals"])
    rows = []
    for minutes in (1, 10, 60, 600):
        for record in result["records"]:
            trial = len(_ONCE) * request + 3 * record["save"] + record["report"]
            row = {"minutes a trial": minutes, "trials so far": record["trials"]}
            for name, cost in (("random", trial), ("bayesian", trial + proposal)):
                share = cost / (60 * minutes) + request / _SIGN_OF_LIFE
                row[name] = {"workers at most": int(1 / share), "cores of 1,000": 1000 * share}
            rows.append(row)
    return {"request": request, "proposal": proposal, "rows": rows}


def table(result):
    """Returns the results as Markdown."""
    lines = [f"    {result['command']}", "", f"{result['processor']}, {result['cores']} cores."]

    def add(titles, rows):
        if not rows:
            return
        lines.extend(["", f"| {' | '.join(titles)} |", f"|{'--:|' * len(titles)}"])
        lines.extend(f"| {' | '.join(map(str, row))} |" for row in rows)

    if killed := result.get("killed"):
        add(
            ["workers", "tuner", "minutes", "kills", "half at once", "trials", "redone", "wrong"],
            [[
                killed["workers"], killed["tuner"], f"{killed['seconds'] / 60:.1f}",
                killed["kills"], killed["kills of half the workers"],
                killed.get("trials completed", "–"),
                killed.get("trials given more than once", "–"), len(killed["wrong"]),
            ]],
        )  # fmt: skip
    add(
        ["workers", "requests/s", "CPU ms a request", "CPU ms a trial", "median ms", "95 % ms"],
        [
            [
                row["workers"], f"{row['requests a second']:.1f}",
                f"{row['chief CPU milliseconds a request']:.1f}",
                f"{row['chief CPU milliseconds a trial']:.0f}",
                f"{row['latency, milliseconds, median']:.1f}",
                f"{row['latency, milliseconds, 95 %']:.1f}",
            ]
            for row in result["load"]
        ],
    )  # fmt: skip
    if signs := result.get("signs of life"):
        add(
            ["signs of life", "requests/s at most", "CPU ms a request"],
            [[
                f"{signs['requests']:,}", f"{signs['requests a second']:,.0f}",
                f"{signs['chief CPU milliseconds a request']:.2f}",
            ]],
        )  # fmt: skip
    add(
        ["trials so far", "a proposal, CPU s (from – to)"],
        [
            [row["trials"], f"{row['seconds']:.2f} ({min(row['each']):.2f}–{max(row['each']):.2f})"]
            for row in result["proposals"]
        ],
    )
    add(
        ["trials so far", "saving, CPU ms", "reporting, CPU ms", "oracle.json, MiB"],
        [
            [
                f"{row['trials']:,}", f"{1000 * row['save']:.0f}", f"{1000 * row['report']:.0f}",
                f"{row['bytes'] / 2**20:.1f}",
            ]
            for row in result["records"]
        ],
    )  # fmt: skip
    if estimate := result.get("estimate"):
        add(
            ["minutes a trial", "trials so far", "workers at most, random", "Bayesian"],
            [
                [
                    row["minutes a trial"], f"{row['trials so far']:,}",
                    *(f"{row[name]['workers at most']:,}" for name in ("random", "bayesian")),
                ]
                for row in estimate["rows"]
            ],
        )  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ |= _ENVIRONMENT
    timing.run_command(main)
