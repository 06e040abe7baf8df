"""Whatever is wrong with what a command is given is said in one line, and nothing else is done."""

import hashlib

import pytest
import warmed
import wrong_inputs

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
