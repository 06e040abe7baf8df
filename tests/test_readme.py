"""The README's code runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 18
    # One epoch on a few images shows the same as three on all of them.
    code = code.replace("epochs=3", "epochs=1").replace(
        'data.load("digits")', 'data.load("digits", train_examples=64)'
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (tmp_path / "student.keras").exists()


def test_the_pairs_are_all_named():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"`{path.stem}`" in text
