"""The study's own arithmetic and bookkeeping; that its cells train is tested with one of them."""

import dataclasses
import json
import os
import signal
import subprocess
import textwrap
import threading
import time

import numpy as np
import pytest
import yaml

from benchmarks.study import __main__ as study
from benchmarks.study import cells, evidence, plan, preparation, tables
from dskd_keras.errors import InputError
from dskd_keras.experiment.command_line import pair_files

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", plan.names())
def test_every_grid_has_configurations_that_can_be_run(name):
    grid = plan.read(name)
    assert len(grid.all_cells()) == len(grid.seeds) * len(grid.cells)
    assert len(plan.smoke(grid).all_cells()) == len(grid.cells)
    settings = {json.dumps(cells.settings(grid.scale, cell)) for cell in grid.all_cells()}
    assert len(settings) == len(grid.cells), "two cells are the same"


def test_one_name_is_one_setting_at_a_scale():
    settings = {}
    for name in plan.names():
        grid = plan.read(name)
        for cell, fields in grid.cells.items():
            assert settings.setdefault((grid.scale.name, cell), fields) == fields


def test_the_pair_whose_teacher_is_packaged_trains_as_the_best_row_of_the_results():
    scale = plan.read_scale("whole")
    cell = plan.Cell("", 0, plan.read("whole-claims").cells["both-10-2-4-until-half"])
    pair = yaml.safe_load(pair_files()["resnet20_resnet8_cifar100"].read_text())
    pair["augmentation"] = "crop_flip"  # what `auto` is for images of 32 pixels
    trained = cells.settings(dataclasses.replace(scale, config=pair), plan.Cell("", 0, {}))
    assert trained == cells.settings(scale, cell)


def test_figures_of_the_results_that_no_table_prints_follow_from_the_kept_cells():
    def accuracies(scale, name, of=lambda cell: cell["metrics"]["test_accuracy"]):
        paths = sorted((plan.KEPT / scale / name).glob("seed-*.json"))
        return np.array([100 * of(cells.read(path)) for path in paths])

    for scale, one, other, figures in (
        ("small", "dskd-tuned", "both-10", "0.94 0.34 1.54"),
        ("small", "dskd-tuned", "dskd-tuned-stage3", "1.22 0.41 2.03"),
        ("small", "dskd-tuned", "both-10-until-half", "0.85 0.22 1.48"),
        ("small", "both-10-until-half", "dskd-tuned-stage3", "0.37 -0.29 1.03"),
        ("small", "both-10-until-half", "both-10", "0.09 -0.38 0.56"),
        ("whole", "both-10-2-4-until-half", "both-10-until-half", "0.94 -0.78 2.66"),
        ("whole", "kd-2-4", "kd-tuned", "1.44 1.16 1.72"),
    ):
        differences = accuracies(scale, one) - accuracies(scale, other)
        _, interval = evidence.paired(list(differences))
        assert " ".join(f"{v:.2f}" for v in (differences.mean(), *interval)) == figures
    for folder, figures in (
        ("small-wrn/both-10-until-half", [0.15, 0.11, 0.67]),
        ("small-wrn/both-10-sums-until-half", [0.76, 0.95, 0.71]),
        ("small/both-10-until-half", [0.54, 0.68, 1.31]),
    ):
        history = cells.read(plan.KEPT / folder / "seed-10.json")["history"]
        stages = [f"deep_feature_loss/stage{stage}" for stage in (1, 2, 3)]
        assert [round(history[stage][0], 2) for stage in stages] == figures
    held_out = [
        accuracies("small", path.name, lambda cell: cell["validation_accuracy"])
        for path in (plan.KEPT / "small").iterdir()
        if path.is_dir() and path.name != "teacher"
    ]
    settings, deviation = _pooled(held_out)
    assert (settings, round(deviation, 1), round(2 * 2**0.5 * deviation, 1)) == (12, 0.6, 1.7)
    machines = [
        accuracies(scale, path.name)
        for scale in ("whole", "whole-on-h100")
        for path in (plan.KEPT / scale).iterdir()
        if path.is_dir() and path.name != "teacher"
    ]
    _, deviation = _pooled(machines)
    here, there = accuracies("whole", "kd-tuned"), accuracies("whole-on-h100", "kd-tuned")
    difference = (there - here).mean()
    assert (round(difference, 1), round(deviation, 1)) == (0.5, 0.3)
    assert round(difference / (deviation * (2 / 3) ** 0.5), 1) == 2.2
    _, deviation = _pooled([here, there])
    assert round(difference / (deviation * (2 / 3) ** 0.5)) == 6


def _pooled(of_settings):
    """Returns how many settings have several seeds, and the deviation of one seed in them."""
    several = [values for values in of_settings if len(values) > 1]
    squares = sum(((values - values.mean()) ** 2).sum() for values in several)
    return len(several), (squares / sum(len(values) - 1 for values in several)) ** 0.5


def test_the_paired_interval_is_that_of_the_paired_t_test():
    from scipy import stats

    a, b = np.random.default_rng(0).normal(70, 1, (2, 5))
    error, interval = evidence.paired(list(a - b))
    independent = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(interval, independent, rtol=1e-12)
    # 2.776 is Student's t for 4 degrees of freedom in printed tables.
    assert interval[1] - interval[0] == pytest.approx(2 * 2.7764 * error, rel=1e-4)
    assert evidence.paired([1.0]) == (None, None)


@pytest.fixture
def grid(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(cells, "WORK", tmp_path / "work")
    grid = plan.read("small-terms")
    return dataclasses.replace(
        grid,
        measured_on="test",
        baseline="kd",
        seeds=[0, 1],
        cells={"kd": {"method": "kd"}, "dskd": {}},
    )


def keep(grid, cell, test, validation=0.5, **settings):
    path = cell.kept(grid.scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = {
        "test_accuracy": test,
        "head_accuracies": {},
        "seconds": 60.0,
        "versions": {"keras": "3"},
    }
    path.write_text(
        json.dumps(
            {
                "settings": cells.settings(grid.scale, cell) | settings,
                "validation_accuracy": validation,
                "metrics": metrics,
                "history": {},
            }
        )
    )


def test_differences_are_to_the_baseline_with_the_same_seed(grid):
    accuracies = {("kd", 0): 0.60, ("dskd", 0): 0.63, ("kd", 1): 0.70, ("dskd", 1): 0.71}
    for cell in grid.all_cells():
        keep(grid, cell, accuracies[cell.name, cell.seed])
    kd, dskd = evidence.rows(grid)
    assert (kd.mean, dskd.mean) == (pytest.approx(65), pytest.approx(67))
    assert dskd.differences == pytest.approx([3, 1]) and dskd.difference == pytest.approx(2)
    assert dskd.error == pytest.approx(1)
    assert "| dskd | 67.00 ± 5.66 | 2 | +2.00 | 1.00 |" in tables.markdown(grid, [kd, dskd])
    for path in tables.write(grid, [kd, dskd]):
        assert path.stat().st_size > 0


def test_a_seed_without_a_baseline_counts_in_the_mean_alone(grid):
    for cell in grid.all_cells():
        if (cell.name, cell.seed) != ("kd", 1):
            keep(grid, cell, 0.6)
    dskd = evidence.rows(grid)[1]
    assert (len(dskd.accuracies), len(dskd.differences), dskd.interval) == (2, 1, None)


def test_a_name_that_was_kept_with_other_settings_is_refused(grid):
    cell = grid.all_cells()[1]
    keep(grid, cell, 0.6, temperature=2.0)
    with pytest.raises(InputError, match=r"'dskd' has temperature 4.0, but the kept cell .* 2\.0"):
        cells.is_kept(grid.scale, cell)


def test_a_cell_that_is_older_than_a_field_had_its_default(grid):
    cell = grid.all_cells()[1]
    keep(grid, cell, 0.6)
    path = cell.kept(grid.scale)
    kept = json.loads(path.read_text())
    del kept["settings"]["teacher_dtype"]
    path.write_text(json.dumps(kept))
    assert cells.is_kept(grid.scale, cell)
    other = dataclasses.replace(cell, fields={"teacher_dtype": "bfloat16"})
    with pytest.raises(InputError, match=r"teacher_dtype 'bfloat16', but .* 'float32'"):
        cells.is_kept(grid.scale, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"only": "ce; kd-tune"}, r"only: 'kd-tune' .* Did you mean 'kd-tuned'"),
        ({"images": "nowhere.npz"}, "images: 'nowhere.npz' should be a file"),
    ],
)
def test_flags_are_refused_before_anything_is_trained(flags, message, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(InputError, match=message):
        study.main("small-claims", **flags)


def test_what_is_kept_is_shown_before_the_rest_is_trained(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(preparation, "prepare", lambda *_: seen.append(capsys.readouterr().out))
    monkeypatch.setattr(cells, "run", lambda *_: [])
    monkeypatch.setattr(cells, "is_kept", lambda scale, cell: cell.name == "kd")
    monkeypatch.setattr(tables, "write", lambda *_: [])
    study.main("small-own-stages")
    (before,) = seen
    assert "| kd" in before and "2 of 20 cells are kept, 18 are to be trained" in before


def test_a_name_that_is_no_grid_lists_the_grids():
    with pytest.raises(InputError, match=plan.names()[0]):
        plan.read("large")


def test_the_grids_are_listed_with_how_much_of_each_is_kept(monkeypatch, capsys):
    monkeypatch.setattr(plan, "names", lambda: ["vgg13_vgg8", "whole-claims"])
    study.list_grids()
    first, second = [line for line in capsys.readouterr().out.splitlines() if " of " in line][:2]
    assert first.split("|")[1:3] == [" vgg13_vgg8   ", "   0 of 9 "]
    assert second.split("|")[1:3] == [" whole-claims ", " 15 of 15 "]


def test_a_cell_is_trained_once_and_its_result_is_kept(grid, tmp_path):
    """The whole way: digits from a file in CIFAR-100's place, the teacher in half precision."""
    from dskd_keras import data

    digits = data.load("digits", image_size=16, train_examples=200)
    images = tmp_path / "images.npz"
    parts = ("x_train", "y_train", "x_test", "y_test")
    np.savez(images, **{part: getattr(digits, part) for part in parts})
    scale = dataclasses.replace(
        grid.scale,
        classes=1,
        teacher={"epochs": 1},
        config={
            **grid.scale.config,
            "teacher": "resnet8",
            "epochs": 2,
            "augmentation": "none",
        },
    )
    said, machine = [], cells.Machine(str(images), on_device=True)
    alone = dataclasses.replace(grid.all_cells()[0], fields={"method": "ce"})
    preparation.prepare(scale, [alone], machine, 1, said.append)
    assert not scale.teacher_weights().exists() and said == []
    preparation.prepare(scale, grid.all_cells(), machine, 1, said.append)
    assert scale.teacher_weights().stat().st_size < 400_000
    (cell,) = [cell for cell in grid.all_cells() if (cell.name, cell.seed) == ("dskd", 1)]
    assert cells.run(scale, [cell], machine, 1, 1, said.append) == []
    kept = cells.read(cell.kept(scale))
    assert len(kept["history"]["val_accuracy"]) == 2 and kept["metrics"]["epochs"] == 2
    assert kept["validation_accuracy"] == pytest.approx(kept["history"]["val_accuracy"][-1])
    config = yaml.safe_load((tmp_path / "work" / scale.name / "dskd-1/wanted.yaml").read_text())
    assert config["teacher_weights"] == str(scale.teacher_weights())
    assert (config["dataset"], config["augment_on"]) == (str(images), "device")
    assert kept["settings"]["dataset"] == "cifar100" and kept["settings"]["augment_on"] == "host"
    before, lines = cell.kept(scale).stat().st_mtime_ns, len(said)
    assert cells.run(scale, [cell], machine, 1, 1, said.append) == []
    assert cell.kept(scale).stat().st_mtime_ns == before and len(said) == lines


def test_a_column_of_a_term_that_ended_is_shorter(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("epoch,loss,deep_feature_loss\n1,2.0000012,3.5\n2,1.5,NA\n")
    expected = {"epoch": [1.0, 2.0], "loss": [2.0, 1.5], "deep_feature_loss": [3.5]}
    assert cells._history(path) == expected


def _two_cells(grid):
    cells.run(grid.scale, grid.all_cells(), cells.Machine(), 2, 1, print)


def _teacher(grid):
    cells.train(grid.scale, plan.teacher_cell(grid.scale), cells.Machine(), 1)


@pytest.mark.parametrize(("train", "count"), [(_two_cells, 2), (_teacher, 1)])
def test_trainings_end_with_the_process_that_began_them(grid, tmp_path, monkeypatch, train, count):
    script = """
        import os, pathlib, signal, time
        def stop(*_):
            here.with_suffix(".stopped").touch()
            raise SystemExit(143)
        signal.signal(signal.SIGTERM, stop)
        here = pathlib.Path(f"{os.getpid()}.begun")
        here.touch()
        time.sleep(60)
    """
    (tmp_path / "train.py").write_text(textwrap.dedent(script))
    monkeypatch.setattr(cells, "_ROOT", tmp_path)

    def interrupt():
        while len(list(tmp_path.glob("*.begun"))) < count:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(grid)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(list(tmp_path.glob("*.stopped"))) == count
    assert len(list(tmp_path.glob("*.begun"))) == count, "no other cell is begun"
