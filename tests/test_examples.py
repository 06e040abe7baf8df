"""The pages of docs/examples run as they stand."""

import importlib.util
import json
import re
from pathlib import Path

import keras
import matplotlib
import numpy as np
import pytest
import small

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
# All run on PyTorch, which compiles nothing, and one on each other backend.
ELSEWHERE = {"tensorflow": "tabular", "jax": "tokens"}
BACKEND = keras.backend.backend()


def blocks(page):
    """The page's Python, block by block, with what each needs beside the project."""
    text = (FOLDER / f"{page}.md").read_text()
    return re.findall(r"```python(?: needs=(\w+))?\n(.*?)```", text, re.DOTALL)


def run(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {"__name__": "example"}
    exec(compile(code, "example", "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES)
@small.eagerly(False)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    if BACKEND != "torch" and page != ELSEWHERE[BACKEND]:
        pytest.skip("run on PyTorch alone")
    code = "\n".join(
        block for needs, block in blocks(page) if not needs or importlib.util.find_spec(needs)
    )
    names = run(code, tmp_path, monkeypatch)
    assert 0 <= names["accuracy"] <= 1
    distiller = names["distiller"]
    assert all(np.isfinite(weight).all() for weight in distiller.student.get_weights())
    assert (tmp_path / "student.keras").is_file()
    printed = capsys.readouterr().out
    # What the page says was printed has these lines, but for the numbers.
    text = (FOLDER / f"{page}.md").read_text()
    said = "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL))
    assert shape(said) and set(shape(said)) <= set(shape(printed))


def shape(text):
    """The lines of a text without its numbers and frames."""
    lines = (re.sub(r"[\d.,%±−+-]+|\s+|[━─│┃]+", " ", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


@pytest.mark.once
def test_the_index_has_every_page():
    index = (FOLDER / "README.md").read_text()
    linked = set(re.findall(r"\]\(([\w-]+)\.(?:md|ipynb)\)", index))
    assert linked == {*PAGES, *(path.stem for path in FOLDER.glob("*.ipynb"))}


@pytest.mark.once
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_holds_what_it_showed(path, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = run("\n".join(code), tmp_path, monkeypatch)
    assert set(names["accuracies"]) >= {"alone", "distilled"}
    kinds = {
        kind
        for cell in cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {"text/plain": ""})
    }
    assert {"image/png", "text/plain"} <= kinds
