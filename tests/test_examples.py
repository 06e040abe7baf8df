"""The pages of docs/examples run as they stand, and print what they say."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import keras
import matplotlib
import numpy as np
import pytest
import small

import dskd_keras
from dskd_keras import losses

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
# All run on PyTorch, which compiles nothing, and one on each other backend.
ELSEWHERE = {"tensorflow": "tabular", "jax": "tokens"}
HERE = [ELSEWHERE[keras.backend.backend()]] if keras.backend.backend() in ELSEWHERE else PAGES


def text_of(page):
    return (FOLDER / f"{page}.md").read_text()


def blocks(page):
    """The page's Python, block by block, with what each needs beside the project."""
    return re.findall(r"^```python(?: needs=(\w+))?\n(.*?)^```", text_of(page), re.M | re.S)


def run(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {"__name__": "example"}
    exec(compile(code, "example", "exec"), names)
    return names


def without_numbers(text):
    return [re.sub(r"\d+(\.\d+)?", "#", " ".join(line.split())) for line in text.splitlines()]


@pytest.mark.parametrize("page", HERE)
@small.eagerly(False)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    names = run("\n".join(code for needs, code in blocks(page) if not needs), tmp_path, monkeypatch)
    # It says what it prints, but for the numbers.
    (said,) = re.findall(r"^```text\n(.*?)^```", text_of(page), re.M | re.S)
    assert without_numbers(said) == without_numbers(capsys.readouterr().out)
    assert 0 < names["accuracy"] <= 1
    assert all(np.isfinite(weight).all() for weight in names["distiller"].student.get_weights())
    # What it leaves behind is the student that it scored.
    saved = keras.models.load_model(tmp_path / "student.keras")
    x = keras.ops.convert_to_tensor(names["x_test"][:8])
    of_saved, of_student = (
        keras.ops.convert_to_numpy(model(x, training=False)) for model in (saved, names["student"])
    )
    np.testing.assert_allclose(of_saved, of_student, rtol=1e-4, atol=1e-5)

    further = [code for needs, code in blocks(page) if needs and importlib.util.find_spec(needs)]
    if further:  # models of KerasHub, under the names of the page
        exec(compile("\n".join(further), "example", "exec"), names)
        terms = names["distiller"].step_terms()
        assert "deep_feature_loss/small_bert_backbone/transformer_layer_0" in terms
        assert all(np.isfinite(value) for value in terms.values())
        assert (tmp_path / "small_bert.keras").is_file()


@pytest.mark.once
def test_every_block_is_run_or_is_what_was_printed():
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", text_of(page), re.M)
        kinds, ends = fences[::2], fences[1::2]
        assert set(kinds) <= {"python", "python needs=keras_hub", "text"}, page
        assert set(ends) == {""} and len(kinds) == len(ends), page
        assert len(blocks(page)) == len(kinds) - 1, page


@pytest.mark.once
def test_the_index_has_every_page_once():
    linked = re.findall(r"^\| \[[\w.-]+\]\(([\w.-]+)\) \|", text_of("README"), re.M)
    assert sorted(linked) == sorted(
        path.name
        for path in FOLDER.iterdir()
        if path.suffix in (".md", ".ipynb") and path.name != "README.md"
    )


@pytest.mark.once
def test_the_losses_are_all_named():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*) \|$", text_of("own-method"), re.M)
    assert [name for name, _, _ in rows] == losses.names()
    for name, cls, source in rows:
        field = "feature_loss" if source.startswith("feature maps") else "prediction_loss"
        assert type(losses.get(field, name)) is getattr(losses, cls)


@pytest.mark.once
def test_a_head_on_a_frozen_layer_changes_nothing_of_the_student():
    """What transfer.md says of them."""
    teacher, student = small.convnet("teacher"), small.convnet("student", batch_norm=False)
    student.get_layer("stage1_conv").trainable = False
    distiller = dskd_keras.Distiller(
        teacher, student, ["stage1"], label_weight=0, prediction_weight=0
    )
    distiller.compile(keras.optimizers.SGD(0.1))
    before = small.values(student.variables)
    heads = [v for v in distiller.trainable_variables if "head_" in v.path]
    of_heads = small.values(heads)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        distiller.train_on_batch(small.images()[0])
    small.assert_same_bits(before, small.values(student.variables))
    assert heads and any((a != b).any() for a, b in zip(of_heads, small.values(heads), strict=True))


@pytest.mark.once
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_holds_what_it_showed(path, tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    # One epoch on a few images shows that it runs; what it learns is in the outputs it holds.
    code, epochs = re.subn(r"epochs=\d+", "epochs=1", code)
    assert epochs == 2
    for whole, few in (("[:900]", "[:200]"), ("[900:]", "[900:1000]")):
        assert code.count(whole) == 2
        code = code.replace(whole, few)
    names = run(code, tmp_path, monkeypatch)
    assert names["accuracies"].keys() == {"teacher", "alone", "distilled"}
    assert all(0 <= accuracy <= 1 for accuracy in names["accuracies"].values())
    figures = len(plt.get_fignums())
    plt.close("all")
    # What it holds has its pictures, and its lines but for the numbers.
    outputs = [output for cell in cells for output in cell["outputs"]]
    pictures = [output["data"]["image/png"] for output in outputs if "data" in output]
    assert len(pictures) == figures > 2
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    stored = "".join("".join(output["text"]) for output in outputs if "text" in output)
    assert without_numbers(stored) == without_numbers(capsys.readouterr().out)
