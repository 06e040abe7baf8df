"""What is installed: a wheel has everything, and its commands work where no clone is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what a wheel installs."""
    pytest.importorskip("setuptools", "77")
    source = tmp_path_factory.mktemp("source")
    for name in ("dskd_keras", "configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("dskd_commands.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", source / "wheel", source],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (source / "wheel").glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed, script, folder):
    """Runs a script in a folder that is not the clone, with the wheel's packages."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {script}"], cwd=folder, text=True,
        capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip


@pytest.mark.once
def test_a_wheel_has_all_modules_and_files(installed):
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dskd_keras").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    expected |= {f"dskd_keras/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    expected.add("dskd_commands.py")
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*")}
    assert expected <= found
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    for name in ("train", "tune", "report"):
        assert f"dskd-{name} = dskd_commands:{name}" in points.read_text()


@pytest.mark.once
def test_the_commands_of_a_wheel_know_the_pairs(installed, tmp_path):
    script = "import dskd_commands; print(dskd_commands.startup.__file__); "
    script += "dskd_commands.{}(['--pair', 'resnet110_resnet32', '--print_config'])"
    for name in ("train", "tune"):
        done = run(installed, script.format(name), tmp_path)
        assert done.returncode == 0, done.stderr
        where, *shown = done.stdout.splitlines()
        assert Path(where).is_relative_to(installed) and "student: resnet32" in shown
    done = run(installed, "import dskd_commands; sys.exit(dskd_commands.report(['x']))", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: run_dir: 'x' does not exist")


@pytest.mark.once
def test_a_missing_extra_is_one_line_with_its_command(tmp_path):
    script = "for name in ('yaml', 'jsonargparse', 'msgspec', 'rich'): sys.modules[name] = None\n"
    script += "import dskd_commands as commands\n"
    script += "sys.exit(commands.train([]) + commands.tune([]) + commands.report(['x']))"
    done = run(ROOT, f"\n{script}", tmp_path)
    assert done.returncode == 6
    errors = done.stderr.strip().splitlines()
    assert [line.partition(" the package")[0] for line in errors] == [
        "error: train:", "error: tune:", "error: report:"
    ]  # fmt: skip
    assert all(line.endswith("pip install 'dskd-keras[train]'") for line in errors)
