"""The documentation: its code runs as it stands, its tables are complete."""

import math
import re
from pathlib import Path

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
