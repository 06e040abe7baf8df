"""Whatever is wrong with what a command is given is said in one line, and nothing else is done."""

import csv
import hashlib
import json

import numpy as np
import pytest
import warmed
import wrong_inputs

from dskd_keras.tuning import ranking

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def process():
    with warmed.Warmed() as process:
        yield process


def contents(folder, without):
    """What is in a folder, by path: what kind it is, and a file's checksum."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not any(name == other or name.startswith(f"{other}/") for other in without):
            is_file = path.is_file() and not path.is_symlink()
            checksum = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else None
            found[name] = (path.lstat().st_mode, checksum)
    return found


@pytest.mark.parametrize("case", wrong_inputs.CASES)
def test_it_is_one_line(case, process, tmp_path):
    case = wrong_inputs.CASES[case]
    folder = tmp_path / "here"
    folder.mkdir()
    wrong_inputs.images(folder)
    if case.make is not None:
        case.make(folder)
    before = contents(folder, case.writes)
    status, errors = process.run(folder, case.command, case.argv, case.output)
    assert status == case.status, errors
    lines = errors.splitlines()
    assert len(lines) == (1 if case.says else 0), errors
    if case.says:
        assert lines[0].startswith("error: ") and case.says in lines[0], errors
        assert lines[0].isprintable()
    assert contents(folder, case.writes) == before


FORMULAS = ("=1+1", "@sum(a)", "\x1b[31mred", "'-2", "-")


def cells(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [cell for row in csv.reader(file) for cell in row]


def test_a_run_whose_output_is_full_is_whole_and_its_cells_are_no_formulas(process, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    labels = {f"y_{part}": np.arange(count) % 5 for part, count in (("train", 12), ("test", 6))}
    wrong_inputs.images(folder, class_names=np.array(FORMULAS), **labels)
    status, errors = process.run(folder, "train", wrong_inputs.CE, "/dev/full", 60)
    assert (status, errors) == (1, "error: standard output: No space left on device.\n")
    seed = folder / wrong_inputs.SEED
    assert 0 <= json.loads((seed / "metrics.json").read_text())["test_accuracy"] <= 1
    written = cells(seed / "confusion.csv")
    assert written[1:6] == ["'=1+1", "'@sum(a)", "\\x1b[31mred", "''-2", "'-"]
    # The report shows them as they were.
    (folder / "run" / "report.html").unlink()
    assert process.run(folder, "report", ["run"], "closed") == (0, "")
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in page


def test_cells_are_read_as_they_were():
    from dskd_keras import csv_cells

    for text in (*FORMULAS, "plain", "'quoted'", "''", "a-b", " =x", "5"):
        assert csv_cells.read(csv_cells.shown(text)) == text.replace("\x1b", "\\x1b")
        assert not csv_cells.shown(text).lstrip().startswith(("=", "+", "-", "@"))


def test_a_searchs_cells_are_no_formulas(tmp_path):
    failed = ranking.TrialResult("0001", {"student_layers": ["-a", "b"]}, None, error="=cmd()\x1b")
    trial = ranking.TrialResult("0000", {"learning_rate": -0.5}, 0.5)
    ranking.write_csv(tmp_path / "trials.csv", [trial, failed])
    written = cells(tmp_path / "trials.csv")
    assert {"'=cmd()\\x1b", "'-a+b", "-0.5"} <= {*written}


def test_a_run_that_never_began_leaves_its_folder_free(process, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    wrong_inputs.images(folder)
    # A rate that float32 holds, after one step of which nothing does.
    argv = [*wrong_inputs.CE, "--learning_rate", "3e38", "--batch_size", "4"]
    status, errors = process.run(folder, "train", argv, seconds=60)
    assert status == 1 and errors.startswith("error: epoch 1, step ") and errors.count("\n") == 1
    status, errors = process.run(folder, "train", wrong_inputs.CE, seconds=60)
    assert (status, errors) == (0, "")
