"""The documentation: its code runs as it stands, its tables are complete."""

import importlib
import math
import re
from pathlib import Path

import keras
import pytest
import small

from dskd_keras import models

ROOT = Path(__file__).parent.parent


@small.eagerly()
def test_the_example_runs(tmp_path, monkeypatch):
    code, search = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 18
    # The search goes on with the names of the first example.
    code += (
        search.replace("max_trials=10", "max_trials=1")
        .replace("[200:]", "[32:]")
        .replace("[:200]", "[:32]")
    )
    # One epoch on a few images shows the same as three on all of them.
    code = code.replace("epochs=3", "epochs=1").replace(
        'data.load("digits")', 'data.load("digits", train_examples=64)'
    )
    code = code.replace('"resnet20"', '"resnet8"').replace(
        "(x_test, digits.y_test)", "(x_test[:32], digits.y_test[:32])"
    )
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "student.keras").exists()


def test_the_pairs_are_all_named_with_the_figures_of_their_rows():
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", text, re.MULTILINE))
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.stem}`" in text
        published = re.findall(r"\b\d\d\.\d\d\b", path.read_text().partition("Command:")[0])
        assert published == re.findall(r"\d\d\.\d\d", rows.get(path.stem, ""))


@pytest.mark.once
def test_the_models_are_all_documented():
    text = (ROOT / "docs" / "models.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", text, re.MULTILINE))
    assert list(rows) == models.names()
    for name in ("resnet8", "ShuffleV2"):
        model = models.create(name, 100, (32, 32, 3))
        count = sum(math.prod(weight.shape) for weight in model.trainable_weights)
        assert rows[name] == f"{count:,}"


OWN_MODELS = (ROOT / "docs" / "own-models.md").read_text()


@pytest.mark.once
def test_the_code_of_own_models_runs(capsys):
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", OWN_MODELS, re.DOTALL)), names)
    assert "stage1" in capsys.readouterr().out
    assert names["distiller"].student_layers == ("stage1", "stage2")
    assert names["distiller"].teacher_layer == "stage3"


def test_what_runs_where_is_what_tests_do():
    column = ["tensorflow", "jax", "torch"].index(keras.backend.backend())
    rows = re.findall(
        r"^\| [^|]+ \| (\S+) \| (\S+) \| (\S+) \| `(\w+)\.py::(\w+)\S*` \|$",
        OWN_MODELS,
        re.MULTILINE,
    )
    assert len(rows) >= 25
    for *cells, module, name in rows:
        test = getattr(importlib.import_module(module), name)
        marks = getattr(test, "pytestmark", [])
        skipped = any(mark.name == "skipif" and mark.args[0] for mark in marks)
        skipped |= keras.backend.backend() != "torch" and any(m.name == "once" for m in marks)
        if "[" not in name:
            assert (cells[column] == "yes") >= (not skipped) or cells[column] == "–", name
            assert not (cells[column] == "yes" and skipped), name
