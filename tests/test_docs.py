"""The documentation: its code runs, its commands are commands, its tables are complete."""

import importlib
import importlib.util
import math
import re
import shlex
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
import small
import test_examples
import yaml

from dskd_keras import models
from dskd_keras.experiment import command_line
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.tuning.config import SearchConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
OWN_MODELS = (DOCS / "own-models.md").read_text()


def blocks(page, kind):
    """The texts of a page's fenced blocks of one kind."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for name, text in found if name == kind]


@small.eagerly()
def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    (code,) = blocks(ROOT / "README.md", "python")
    assert len(code.strip().splitlines()) <= 18
    # One epoch on a few images shows the same as three on all of them.
    code = code.replace("epochs=3", "epochs=1").replace(
        "image_size=16", "image_size=16, train_examples=64"
    )
    code = code.replace('"resnet20"', '"resnet8"').replace(
        "(x_test, digits.y_test)", "(x_test[:32], digits.y_test[:32])"
    )
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "student.keras").exists()


@pytest.mark.once
def test_a_search_of_ones_own_runs(tmp_path, monkeypatch):
    (code,) = blocks(DOCS / "search.md", "python")
    for whole, few in (
        ("train_examples=600", "train_examples=64"), ("max_trials=10", "max_trials=1"),
        ("[200:]", "[32:]"), ("[:200]", "[:32]"), ("epochs=3", "epochs=1"),
        ('"resnet20"', '"resnet8"'),
    ):  # fmt: skip
        assert whole in code
        code = code.replace(whole, few)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert list((tmp_path / "runs" / "mine").glob("trial_*"))


@pytest.mark.once
def test_getting_started_prints_what_it_says(tmp_path, monkeypatch, capsys):
    page = DOCS / "getting-started.md"
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(blocks(page, "python")), names)
    printed = capsys.readouterr().out
    (said,) = blocks(page, "text")
    assert test_examples.without_numbers(said) == test_examples.without_numbers(
        printed[printed.index("supervised:") :]
    )
    saved = keras.models.load_model(tmp_path / "student.keras")
    np.testing.assert_allclose(
        saved.predict(names["x_test"][:8], verbose=0),
        names["student"].predict(names["x_test"][:8], verbose=0),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.once
def test_the_code_of_own_models_runs(capsys):
    names = {}
    exec("\n".join(blocks(DOCS / "own-models.md", "python")), names)
    assert "stage1" in capsys.readouterr().out
    stages = ["stage1", "stage2", "stage3"]
    assert list(names["distiller"].student_layers) == names["distiller"].teacher_layer == stages


@pytest.mark.once
def test_no_code_is_left_out():
    run_here = {"README.md": 1, "search.md": 1, "getting-started.md": 4, "own-models.md": 3}
    # The first reads a file that is not there, what it calls is tested; the second: test_trained.
    run_elsewhere = {"models.md": 2}
    for page in PAGES:
        expected = (run_here | run_elsewhere).get(page.name, 0)
        assert len(blocks(page, "python")) == expected, page.name
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.M)
        assert set(fences[::2]) <= {"", "python", "text", "yaml"}, page.name


def commands():
    """All lines of the pages that a shell would take, with the page."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n", " ", "\n".join(blocks(page, "")))
        inline = re.findall(r"`((?:python|make|pip) [^`]+)`", page.read_text())
        for line in [*text.splitlines(), *inline]:
            line = line.partition(" #")[0].strip()
            if re.match(r"(\w+=\S+\s+)*(\S*python|make|pip) ", line):
                found.append((page.name, line))
    return found


@pytest.mark.once
@pytest.mark.parametrize("page, line", commands())
def test_a_command_is_one(page, line, tmp_path, monkeypatch, capsys):
    words = shlex.split(re.sub(r"^(\w+=\S+\s+)+", "", line))
    if words[0] == "make":
        target = words[1]
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] == "pip":
        extras = re.search(r"\[([\w,]+)\]", line)[1].split(",")
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        return
    if words[1] == "-m" and words[2] in ("venv", "pytest"):
        return
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]), line
        return
    script = ROOT / words[1]
    assert script.is_file(), line
    if script.name not in ("train.py", "tune.py"):
        return
    monkeypatch.chdir(tmp_path)
    best = tmp_path / "runs/resnet56_resnet20/search/best.yaml"
    for path in (best, tmp_path / "runs/resnet110_resnet32/search/best.yaml"):
        path.parent.mkdir(parents=True)
        path.write_text(f"pair: {path.parts[-3]}\nteacher: resnet56\nstudent: resnet20\n")
    (tmp_path / "mine.yaml").write_text(blocks(DOCS / "tables.md", "yaml")[0])
    kind = {"train.py": ExperimentConfig, "tune.py": SearchConfig}[script.name]
    shown = {"--help", "--print_config"} & set(words)
    try:
        config = command_line.parse(kind, words[2:], script.name)
    except SystemExit as end:
        assert shown and not end.code and capsys.readouterr().out
    else:
        assert not shown and isinstance(config, kind)


@pytest.mark.once
def test_files_of_the_pages_are_taken(tmp_path):
    (mine,) = blocks(DOCS / "tables.md", "yaml")
    file = tmp_path / "mine.yaml"
    file.write_text(mine)
    flags = ["--teacher", "resnet32x4", "--student", "resnet20", "--run_dir", "runs/mine"]
    of_file, of_flags = (
        command_line.parse(ExperimentConfig, argv, "train.py")
        for argv in (["--config", str(file)], flags)
    )
    assert of_file == of_flags, "the page calls them the same"
    (ranges,) = blocks(DOCS / "search.md", "yaml")
    file.write_text(ranges)
    search = command_line.parse(
        SearchConfig, ["--pair", "resnet20_resnet8", "--config", str(file)], "tune.py"
    )
    assert search.ranges.temperature == [2, 8] and search.ranges.learning_rate is None
    assert yaml.safe_load(ranges)["trial_epochs"] == search.trial_epochs


@pytest.mark.once
def test_every_field_that_a_page_names_is_one():
    known = {*ExperimentConfig.__dataclass_fields__, *SearchConfig.__dataclass_fields__}
    known |= {"help", "config", "print_config", "output"}
    known |= {"held_out", "most"}  # of benchmarks.tasks and benchmarks.study
    for page in PAGES:
        for flag in re.findall(r"`--(\w+)", page.read_text()):
            assert flag in known, f"{page.name}: --{flag}"


def test_the_pairs_are_all_named_with_the_figures_of_their_rows():
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\|(.*)\|$", text, re.MULTILINE))
    table = re.search(r"^\| pair \|.*?\n\n", text, re.M | re.S)[0]
    assert table in (DOCS / "tables.md").read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.stem}`" in text
        published = re.findall(r"\b\d\d\.\d\d\b", path.read_text().partition("Command:")[0])
        assert published == re.findall(r"\d\d\.\d\d", rows.get(path.stem, ""))


@pytest.mark.once
def test_the_models_are_all_documented():
    text = (DOCS / "models.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", text, re.MULTILINE))
    assert list(rows) == models.names()
    for name in ("resnet8", "ShuffleV2"):
        model = models.create(name, 100, (32, 32, 3))
        count = sum(math.prod(weight.shape) for weight in model.trainable_weights)
        assert rows[name] == f"{count:,}"


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


@pytest.mark.once
def test_what_starts_several_hosts_can_be_read():
    page = DOCS / "scale.md"
    (script,) = (text for text in blocks(page, "") if text.startswith("#!"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (manifest,) = blocks(page, "yaml")
    service, job = yaml.safe_load_all(manifest)
    assert service["kind"] == "Service" and service["spec"]["clusterIP"] == "None"
    spec = job["spec"]
    assert job["kind"] == "Job" and spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    environment = {variable["name"]: variable for variable in container["env"]}
    assert int(environment["JAX_NUM_PROCESSES"]["value"]) == spec["completions"]
    assert spec["completions"] == spec["parallelism"]
    host, _, subdomain = environment["JAX_COORDINATOR_ADDRESS"]["value"].partition(".")
    assert host == f"{job['metadata']['name']}-0"
    assert subdomain.partition(":")[0] == spec["template"]["spec"]["subdomain"]
    assert subdomain.partition(":")[0] == service["metadata"]["name"]
    started = re.sub(r"\\\n", " ", script[script.index("python train.py") :])
    for words in (container["command"], shlex.split(started)):
        config = command_line.parse(ExperimentConfig, words[2:], "train.py")
        assert config.devices == "all" and config.resume
