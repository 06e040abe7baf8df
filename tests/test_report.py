"""The report, from run folders written by hand: nothing is trained here."""

import base64
import csv
import dataclasses
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from dskd_keras import drawing, report
from dskd_keras.errors import InputError
from dskd_keras.report import RunResult, confusion, curves, gained, layers, reading, results_table
from dskd_keras.report.command import main

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
LAYERS = ("stage1", "stage2")
CLASSES = ("ant", "bee", "cat")
TEACHER = RunResult("teacher", "resnet20", 272474, 0.9, latency_ms=8.0, weight_bytes=2**21, seed=0)


def write_seed(run, method="dskd", seed=0, epochs=3, done=None, label_weight=1.0):
    """Writes the folder of a run; one with fewer epochs done than asked for is unfinished."""
    folder = run / method / f"seed-{seed}"
    folder.mkdir(parents=True)
    config = {
        "teacher": "resnet20", "student": "resnet8", "method": method, "dataset": "digits",
        "epochs": epochs, "student_layers": list(LAYERS), "label_weight": label_weight,
        "seeds": [seed], "run_dir": str(run),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = [history_row(method, epoch + 1) for epoch in range(epochs if done is None else done)]
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, history_row(method, 1))
        writer.writeheader()
        writer.writerows(rows)
    if done is None:
        result = RunResult(
            method, "resnet8", 77850, 0.8 + 0.02 * seed, best_accuracy=0.83, best_epoch=2,
            best_chosen_on="test", images_per_second=1500.0, epochs=epochs, seed=seed,
            backend="jax", versions={"keras": "3.15.1", "jax": "0.10.2"},
            command=f"python train.py --method {method}", dataset="digits", latency_ms=2.0,
            weight_bytes=2**19,
            **{} if method == "ce" else {
                "teacher": dataclasses.asdict(TEACHER), "teacher_agreement": 0.875,
            },
            **{"head_accuracies": {"stage1": 0.4567, "stage2": 0.61}} if method == "dskd" else {},
        )  # fmt: skip
        (folder / "metrics.json").write_text(result.to_json())
        write_confusion(folder, CLASSES, [[8, 2, 0], [0, 10, 0], [1, 0, 9]])
    return folder


def history_row(method, epoch):
    accuracy = min(0.49 + 0.01 * epoch, 0.96)
    row = {"epoch": epoch, "accuracy": 0.5, "val_accuracy": accuracy, "val_loss": 1.0}
    row["loss"] = 5.0 / epoch
    if method == "dskd":
        for position, layer in enumerate(LAYERS):
            for kind in ("prediction", "feature"):
                row[f"deep_{kind}_loss/{layer}"] = 2.0 - position
                row[f"deep_{kind}_allocation/{layer}"] = (0.7, 0.3)[position]
    return row


def write_confusion(folder, names, counts):
    with open(folder / "confusion.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        writer.writerows([name, *row] for name, row in zip(names, counts, strict=True))


def text_of(path):
    """Returns a page's text as a reader sees it, without its tags and pictures."""
    page = path.read_text(encoding="utf-8")
    page = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def embedded(path):
    return re.findall(r'src="data:image/png;base64,([^"]+)"', path.read_text(encoding="utf-8"))


def drawn(png):
    """Returns the picture, having checked that something is on it."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert min(picture.size) > 300 and len(picture.getcolors(2**24)) > 10
    return picture


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run of three methods, one seed of which goes on, and its report."""
    run = tmp_path_factory.mktemp("runs") / "resnet20_resnet8"
    for method, seed in (("dskd", 0), ("dskd", 1), ("kd", 0), ("ce", 0)):
        write_seed(run, method, seed)
    write_seed(run, "kd", 1, epochs=240, done=57)
    (run / "dskd" / "seed-0.unfinished-1").mkdir()
    (run / "dskd" / "seed-0.unfinished-1" / "history.csv").write_text("epoch,loss\n1,77777\n")
    return report.write([run])


def test_the_page_has_the_numbers(reported):
    text = text_of(reported)
    assert reported.name == "report.html" and reported.parent.name == "resnet20_resnet8"
    for expected in (
        "resnet20 → resnet8 on digits", "resnet20 teacher 0 90.00",
        "resnet8 dskd 0 1 81.00 ± 1.41 −9.00",
        "resnet8 ce 0 80.00", "87.5",  # agreement
        "head on stage1 45.67", "head on stage2 61.00", "the student itself 81.00 ± 1.41",
        "77,850 3.5× fewer 0.50 4× smaller 2.00 4× faster",
        "ant bee 2 of 10 20.0", "cat ant 1 of 10 10.0",
        "jax keras 3.15.1, jax 0.10.2", "python train.py --method kd",
    ):  # fmt: skip
        assert expected in text, expected


def test_an_unfinished_run_is_shown_as_far_as_it_is(reported):
    text = text_of(reported)
    assert "resnet8 kd 1 96.00 so far epoch 57 of 240, unfinished" in text
    assert "77777" not in text and "unfinished-1" not in text


def test_the_configuration_shows_at_once_what_differs(reported):
    page = reported.read_text(encoding="utf-8")
    marked = re.findall(r'<tr class="differs"><th scope="row">(\w+) ≠', page)
    assert marked == ["method", "epochs", "seeds"]
    assert page.index("epochs ≠") < page.index(">student_layers<")
    text = text_of(reported)
    assert "epochs ≠ 3 seed 0: 3; seed 1: 240 3" in text
    assert "The seeds of kd were configured differently (epochs)" in text
    assert "student_layers stage1, stage2" in text


def test_the_page_is_whole_in_itself(reported):
    page = reported.read_text(encoding="utf-8")
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert all(source.startswith("data:image/png;base64,") for source in
               re.findall(r'(?:src|href)="([^"]*)"', page))  # fmt: skip
    assert "url(" not in page and "@import" not in page
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 9 and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert "dskd seed 1 82.00 % (finished)" in page and "stage1 70 %, stage2 30 %" in page


def test_the_pictures_lie_beside_the_runs_and_in_the_page(reported):
    run = reported.parent
    places = ["learning_curves.png"]
    places += [f"dskd/seed-{s}/{n}.png" for s in (0, 1) for n in ("layer_weights", "layer_losses")]
    places += [f"{m}/seed-{s}/confusion.png" for m, s in
               (("dskd", 0), ("dskd", 1), ("kd", 0), ("ce", 0))]  # fmt: skip
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*.png")) == sorted(places)
    shown = {base64.b64decode(data) for data in embedded(reported)}
    for place in places:
        assert (run / place).read_bytes() in shown, place
    for place in (places[0], *places[-3:-1], *places[1:3]):
        drawn((run / place).read_bytes())
    assert not [path for path in run.rglob(".*")], "something was left that was written aside"


def test_a_report_is_made_anew(reported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reported.parent / "kd" / "seed-0", run / "kd" / "seed-0")
    (run / "kd" / "seed-0" / "confusion.csv").unlink()
    page = report.write(run)
    before = (page.read_bytes(), (run / "learning_curves.png").read_bytes())
    assert report.write([run]) == page
    assert (page.read_bytes(), (run / "learning_curves.png").read_bytes()) == before
    history = run / "kd" / "seed-0" / "history.csv"
    row = {**history_row("kd", 4), "val_accuracy": 0.99}
    history.write_text(history.read_text() + ",".join(map(str, row.values())) + "\n")
    report.write([run])
    assert (run / "learning_curves.png").read_bytes() != before[1]


def test_runs_that_have_only_begun(tmp_path):
    folder = write_seed(tmp_path / "run", done=0)
    for history in (None, "", "epoch", "epoch,loss,val_accuracy\n"):
        if history is None:
            (folder / "history.csv").unlink()
        else:
            (folder / "history.csv").write_text(history)
        text = text_of(report.write([tmp_path / "run"]))
        assert "epoch 0 of 3, unfinished" in text and "No epoch is finished yet" in text
    assert not list(tmp_path.rglob("*.png"))


def test_histories_that_were_cut_off_or_repeat_epochs(tmp_path):
    folder = write_seed(tmp_path / "run", "kd", done=0)
    rows = ["{},3.0,0.1", "{},2.5,0.2", "{},nan,0.3", "{},2.0,0.25"]
    # Those of older versions call their first epoch 0.
    for first, end in ((1, ""), (1, "3"), (1, "3,1.0"), (0, "2,1.0,0."), (0, "2,1.0,0.9")):
        epochs = [first, first + 1, first + 2, first + 1]
        lines = [row.format(epoch) for row, epoch in zip(rows, epochs, strict=True)]
        text = "\n".join(["epoch,loss,val_accuracy", *lines, end])
        (folder / "history.csv").write_text(text)
        (run,) = reading.read_runs([tmp_path / "run"])
        history = run.seeds[0].history
        np.testing.assert_array_equal(history["epoch"], [1, 2, 3])
        np.testing.assert_array_equal(history["val_accuracy"], [0.1, 0.25, 0.3])
        np.testing.assert_array_equal(history["loss"], [3.0, 2.0, np.nan])
        assert run.seeds[0].state == "epoch 3 of 3, unfinished"
    drawn(curves.learning_curves(run))


def test_damaged_files_are_passed_over_and_named(tmp_path):
    damages = [
        ("metrics.json", '{"method": "kd", "mod'),
        ("metrics.json", '{"method": "kd"}'),
        ("metrics.json", "[1]"),
        ("config.yaml", "teacher: [unclosed"),
        ("config.yaml", "just words"),
        ("confusion.csv", "true \\ predicted,a,b\na,1,2\nb,3"),
        ("confusion.csv", "true \\ predicted,a,b\na,1,x\nb,3,4\n"),
        ("confusion.csv", ""),
        ("history.csv", "\udcff\udcfe\0\0"),
    ]
    for seed, (name, content) in enumerate(damages):
        folder = write_seed(tmp_path / "run", "kd", seed)
        if name != "confusion.csv":
            (folder / "confusion.csv").unlink()
        (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    text = text_of(report.write([tmp_path / "run"]))
    for seed, (name, _) in enumerate(damages):
        named = f"kd/seed-{seed}/{name} is damaged and was passed over." in text
        assert named == (name != "history.csv")
    # Without its result a run counts as unfinished.
    assert "resnet8 kd 3 4 5 6 7 8 91.00" in text
    for seed in range(3):
        assert f"resnet8 kd {seed} 52.00 so far epoch 3 of 3, unfinished" in text


def test_names_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    folder = write_seed(tmp_path / "a<b>&c", "kd")
    write_confusion(folder, (evil, "$b^$", "c"), [[1, 2, 0], [0, 3, 0], [0, 0, 3]])
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"dataset": "<img src=x>", "command": "train.py --x '<b>'", "model": "<i>net"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    path = report.write([tmp_path / "a<b>&c"])
    page = path.read_text(encoding="utf-8")
    for forbidden in ("<script", "<b>", "<img src=x", "<i>"):
        assert forbidden not in page
    for shown in (evil, "<img src=x>", "--x '<b>'", "<i>net"):
        assert shown in html.unescape(page)


def test_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Other tests look at these.
    for module, name in ((curves, "learning_curves"), (confusion, "picture"),
                         (layers, "allocations"), (layers, "losses")):  # fmt: skip
        monkeypatch.setattr(module, name, lambda shown, name=name: name.encode())
    for parent in ("old", "new"):
        write_seed(tmp_path / parent / "pair", "kd", label_weight=float(parent == "old"))
    write_seed(tmp_path / "going", "dskd", done=2)
    path = report.write(["old/pair", "new/pair", "going", "./old/pair"])
    assert path.name == "report.html" and (tmp_path / "report.html").exists()
    text = text_of(path)
    assert "old/pair resnet8 kd 0 80.00" in text and "new/pair resnet8 kd 0 80.00" in text
    assert "going resnet8 dskd 0 51.00 so far epoch 2 of 3, unfinished" in text
    assert text.count("old/pair resnet8 kd") == 1
    assert "label_weight ≠ 1.0 0.0 1.0" in text
    compared, *others = [base64.b64decode(data) for data in embedded(path)]
    drawn(compared)
    assert [others.count(name) for name in (b"learning_curves", b"picture")] == [3, 2]
    assert (tmp_path / "going" / "learning_curves.png").exists()
    assert not (tmp_path / "going" / "report.html").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_seed(tmp_path / "run", "kd")
    write_seed(tmp_path / "run", "kd", 1, done=1)
    assert main(["run", "--output", "page.html"]) == 0
    printed = capsys.readouterr().out
    for expected in ("80.00", "87.5", "run/kd/seed-1: epoch 1 of 3, unfinished",
                     "Report: page.html"):  # fmt: skip
        assert expected in printed
    assert (tmp_path / "page.html").exists()
    assert not (tmp_path / "run" / "report.html").exists()


def test_wrong_folders_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_seed(tmp_path / "runs" / "pair", "kd", done=1)
    (tmp_path / "empty" / "kd" / "seed-0.unfinished-1").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        (["runs/nothing"], "run_dir: 'runs/nothing' does not exist. Runs beside it: 'runs/pair'."),
        (["runs/pair", "no"], "run_dir: 'no' does not exist. Give a run folder, such as runs/PAIR"),
        (["file"], "run_dir: 'file' is a file, not a run folder"),
        (["runs"], "run_dir: 'runs' is no run folder, but holds some: 'runs/pair'."),
        (["runs/pair/kd"], "is the folder of one method. Give the run folder, 'runs/pair'."),
        (["runs/pair/kd/seed-0"], "is the folder of one seed. Give the run folder, 'runs/pair'."),
        (["empty"], "holds no run. A run folder, such as runs/PAIR, has METHOD/seed-N inside, "
                    "with METHOD one of ce, kd, dskd."),
        (["runs/pair", "--output", "runs"], "output: 'runs' is a folder"),
        (["runs/pair", "--output", "file/page.html"], "output: there is no folder 'file'"),
    ):  # fmt: skip
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        error = captured.err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error, error
        assert not captured.out
    with pytest.raises(InputError, match="none given"):
        report.write([])


@pytest.mark.parametrize("epochs", [1, 240])
def test_pictures_of_short_and_long_runs(tmp_path, epochs):
    before = dict(matplotlib.rcParams)
    write_seed(tmp_path / "run", "dskd", 0, epochs=epochs)
    write_seed(tmp_path / "run", "dskd", 1, epochs=epochs)
    (run,) = reading.read_runs(tmp_path / "run")
    drawn(curves.learning_curves(run))
    for picture in (layers.allocations, layers.losses):
        drawn(picture(run.seeds[0]))
    assert dict(matplotlib.rcParams) == before


def test_a_loss_that_is_no_number_any_more_is_left_out(tmp_path):
    folder = write_seed(tmp_path / "run", "dskd", done=3)
    text = (folder / "history.csv").read_text()
    (folder / "history.csv").write_text(re.sub(r"(?m)^(2|3),.*", lambda m: re.sub(
        r"(?<=,)[\d.]+", "nan", m[0]), text))  # fmt: skip
    (run,) = reading.read_runs([tmp_path / "run"])
    assert np.isnan(run.seeds[0].history["loss"]).sum() == 2
    drawn(curves.learning_curves(run))
    drawn(layers.losses(run.seeds[0]))


def test_allocations_that_ended_are_labelled_where_they_were(tmp_path, monkeypatch):
    folder = write_seed(tmp_path / "run", "dskd", done=3)
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = float(rows[1]["deep_feature_allocation/stage1"])
    for name in rows[2]:
        if name.startswith("deep_"):
            rows[2][name] = "NA"
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    labelled = []
    monkeypatch.setattr(
        layers.drawing, "label_ends", lambda _, ends: labelled.extend(ends.values())
    )
    (run,) = reading.read_runs([tmp_path / "run"])
    drawn(layers.allocations(run.seeds[0]))
    drawn(layers.losses(run.seeds[0]))
    height, text, _ = labelled[1][0]
    assert height == pytest.approx(50 * expected) and text == f"stage1 {100 * expected:.0f} %"


def test_many_classes_have_the_most_confused_pairs_beside_the_matrix():
    counts = np.eye(200, dtype=int) * 50
    counts[7, 11], counts[3, 4] = 20, 5
    matrix = reading.Confusion(tuple(f"class {number}" for number in range(200)), counts)
    assert matrix.pairs(5) == [("class 7", "class 11", 20, 70), ("class 3", "class 4", 5, 55)]
    wide = drawn(confusion.picture(matrix))
    assert wide.width > 1.8 * wide.height
    for count in (1, 21):
        perfect = reading.Confusion(tuple("ab" * 11)[:count], np.eye(count, dtype=int))
        assert perfect.pairs(5) == []
        drawn(confusion.picture(perfect))


def test_cells_of_the_matrix_hold_counts_and_are_coloured_by_shares():
    counts = np.array([[1999, 1], [3, 1]])
    axes = drawing.new_figure(4, 4).add_subplot()
    confusion._draw_matrix(axes, reading.Confusion(("a", "b"), counts))
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "1,999", (1, 0): "1", (0, 1): "3", (1, 1): "1"}
    (image,) = axes.get_images()
    np.testing.assert_allclose(image.get_array(), [[99.95, 0.05], [75.0, 25.0]])
    # What is rare can be told from nothing, and from the rest.
    colours = image.cmap(image.norm(np.array([0.0, 0.05, 1.0, 10.0])))
    assert np.abs(np.diff(colours[:, :3], axis=0)).max(axis=1).min() > 0.01


def test_twenty_layers_differ_in_colour_or_style():
    layers = {f"layer{number}": np.array([1.0, np.nan, 2.0]) for number in range(20)}
    lines = drawing.layer_lines(drawing.new_figure(4, 4).add_subplot(), np.arange(3), layers)
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 20
    assert [line.get_label() for line in lines] == list(layers)
    assert all(list(line.get_xdata()) == [0, 2] for line in lines)


def test_labels_keep_apart_and_long_names_stay_different():
    places = drawing._apart([0.0, 0.01, 0.5, 0.98, 1.0], 0.1)
    assert np.diff(places).min() >= 0.1 - 1e-9 and places[2] == 0.5
    assert places[0] >= -1e-9 and places[-1] <= 1 + 1e-9
    names = [f"outer_model/some_block/conv_{number}_of_the_network" for number in range(4)]
    short = drawing.short_all(names, 20)
    assert len(set(short)) == 4 and max(map(len, short)) <= 20
    assert drawing.short_all(["a/relu", "b/relu"], 20) == ["a/relu", "b/relu"]


def test_results_of_other_versions_load(tmp_path):
    values = {"method": "kd", "model": "m", "parameters": 3, "test_accuracy": 0.5}
    assert RunResult.from_dict({**values, "unheard_of": 1, "versions": None}) == RunResult(**values)
    full = RunResult(**values, head_accuracies={"a": 0.5}, teacher=values, latency_ms=1.5)
    path = tmp_path / "metrics.json"
    path.write_text(full.to_json())
    assert json.loads(path.read_text()) == dataclasses.asdict(full)
    assert path.read_text().startswith("{\n  ") and path.read_text().endswith("}\n")
    assert RunResult.read(path) == full
    for content, message in (
        (None, "can't read"),
        ("{", "is damaged: not JSON"),
        ("[]", "Expected `object`, got `array`"),
        ('{"method": "kd"}', "missing required field `model`"),
        (json.dumps({**values, "model": None}), "missing required field `model`"),
        (json.dumps({**values, "test_accuracy": "x"}), r"Expected `float`, .* `\$.test_accuracy`"),
        (json.dumps({**values, "test_accuracy": np.nan}), r"`float` >= 0.0 .* `\$.test_accuracy`"),
        (json.dumps({**values, "latency_ms": np.inf}), r"`float` <= .* `\$.latency_ms`"),
        (json.dumps({**values, "epochs": True}), r"Expected `int .* `\$.epochs`"),
        (json.dumps({**values, "head_accuracies": {"a": "x"}}), r"`float`, .* `\$.head_accuracies"),
    ):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(InputError, match=message) as error:
            RunResult.read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).startswith("result: ")


def test_table_has_a_column_only_where_something_is_known():
    plain = [RunResult("kd", "resnet8", 77850, 0.8)]
    assert not {"agreement", "latency", "MiB"} & set(printed(plain).split())
    text = printed(
        [
            TEACHER,
            *(RunResult("dskd", "MobileNetV2", 812836, accuracy, accuracy + 0.01, 230, "test",
                        1523.4, seed=seed, teacher_agreement=0.8125 + accuracy / 100,
                        latency_ms=2.5, weight_bytes=2**20, teacher=dataclasses.asdict(TEACHER))
              for seed, accuracy in enumerate((0.70, 0.71, 0.72))),
        ]
    )  # fmt: skip
    assert max(map(len, text.splitlines())) <= 110
    row = next(line for line in text.splitlines() if "MobileNetV2" in line)
    assert row.split() == [
        "MobileNetV2", "dskd", "812,836", "71.00", "±", "1.00", "72.00", "±", "1.00", "82.0", "±",
        "0.0", "1,523", "±", "0", "2.50", "1.00", "0", "1", "2",
    ]  # fmt: skip
    assert "2.00" in next(line for line in text.splitlines() if "teacher" in line)  # MiB


def test_the_module_needs_no_keras_and_checks_folders_before_it_imports_matplotlib(tmp_path):
    write_seed(tmp_path / "run", "kd", done=1)
    script = (
        "import runpy, sys\n"
        "from dskd_keras.report.command import main\n"
        "assert main(['no']) == 2\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.argv[1:] = ['run']\n"
        "try:\n"
        "    runpy.run_module('dskd_keras.report', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert 'matplotlib' in sys.modules and 'keras' not in sys.modules\n"
        "sys.modules['matplotlib.axes'] = None\n"
        "del sys.modules['dskd_keras.drawing'], sys.modules['dskd_keras.report.curves']\n"
        "del sys.modules['dskd_keras'].drawing, sys.modules['dskd_keras.report'].curves\n"
        "assert main(['run']) == 2\n"
        "del sys.modules['dskd_keras.report.reading'], sys.modules['dskd_keras.report.page']\n"
        "del sys.modules['dskd_keras.report'].reading, sys.modules['dskd_keras.report'].page\n"
        "del sys.modules['dskd_keras.yaml_files'], sys.modules['dskd_keras'].yaml_files\n"
        "sys.modules['yaml'] = None\n"
        "assert main(['run']) == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path,
        env={**os.environ, "DSKD_KERAS_DEFER": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Report: run/report.html" in done.stdout
    assert done.stderr.splitlines() == [
        "error: run_dir: 'no' does not exist. Runs beside it: 'run'.",
        "error: picture: the package matplotlib is not installed. Install it with: "
        "pip install 'dskd-keras[train]'",
        "error: report: the package pyyaml is not installed. Install it with: "
        "pip install 'dskd-keras[train]'",
    ]


def printed(results):
    console = Console(width=110, file=io.StringIO(), highlight=False)
    console.print(results_table("title", results))
    return console.file.getvalue()


@pytest.mark.once
def test_one_sentence_sets_the_student_beside_its_teacher():
    teacher = RunResult("teacher", "resnet20", 9, 0.9, latency_ms=4.0, weight_bytes=400)
    students = [
        RunResult("dskd", "resnet8", 3, accuracy, latency_ms=1.0, weight_bytes=100, seed=seed)
        for seed, accuracy in enumerate((0.86, 0.88))
    ]
    assert gained([teacher, *students]) == (
        "resnet8 takes 0.25 of the memory of resnet20, predicts one image in 0.25 of its time and "
        "is 3.00 points less accurate."
    )
    better = RunResult("dskd", "resnet8", 3, 0.91)
    assert gained([teacher, better]) == "resnet8 is 1.00 points more accurate."
    assert gained([teacher, RunResult("kd", "resnet8", 3, 0.9)]) == "resnet8 is as accurate."
    assert gained(students) is None and gained([teacher]) is None
