"""Runs that are stopped, killed or run out of disk, and go on to the numbers of one that was not.

Three epochs of four steps for the teacher as for the student, a checkpoint every second step and
after every epoch.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import small
from PIL import Image

import train
from dskd_keras.experiment import (
    build,
    checkpoints,
    evaluation,
    pipeline,
    saved_models,
    training,
)

ROOT = Path(__file__).parent.parent
BACKEND = keras.backend.backend()

# In the order in which a run comes by. After each the run is started again with --resume.
MOMENTS = [
    "teacher:step:1", "teacher:half:2", "teacher:step:3", "teacher:epoch:4", "teacher:renamed:4",
    "teacher:step:7", "teacher:test:8", "teacher:aside:10", "teacher:step:11", "teacher:trained:0",
    "teacher:saved:0",
    "student:step:1", "student:aside:2", "student:step:3", "student:test:4", "student:half:4",
    "student:renamed:6", "student:step:7", "student:epoch:8", "student:step:11",
    "student:trained:0", "student:saved:0", "student:evaluated:0",
]  # fmt: skip
# Where every process compiles its steps anew.
FEWER_MOMENTS = ["student:step:7"]


@pytest.fixture(scope="module", autouse=True)
def _eagerly():
    """TensorFlow would spend these tests on compiling."""
    with small.eagerly():
        yield


@pytest.fixture(scope="module", autouse=True)
def _tiny_models_without_report_and_timing():
    """Most of the time of such short runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build.models, "create", small.created)
        patched.setattr(pipeline.report, "write", lambda folders: "no report")
        patched.setattr(evaluation, "_LATENCY_REPETITIONS", 1)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An .npz of noise, 60 images of 8×8: what matters here is that the same bits come out."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}_{part}": rng.integers(0, high, (count, *shape)).astype("uint8")
        for part, count in (("train", 60), ("test", 30))
        for kind, high, shape in (("x", 256, (8, 8, 3)), ("y", 3, ()))
    }
    arrays["y_train"][:3] = arrays["y_test"][:3] = range(3)
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    np.savez(path, **arrays)
    return path


def flags(images, folder, *more):
    return [
        "--teacher", "resnet8", "--student", "resnet8", "--dataset", str(images), "--epochs", "3",
        "--batch_size", "16", "--run_dir", str(folder / "run"), "--teacher_dir",
        str(folder / "teachers"), "--checkpoint_steps", "2", *map(str, more),
    ]  # fmt: skip


def process(moments, images, folder, *more):
    """Runs train.py in processes of their own, which die at their moments."""
    return subprocess.run(
        # A file would be run again by the processes that decode a stream.
        [sys.executable, "-c", "import killed_run", moments, *flags(images, folder, *more)],
        env={**os.environ, "KERAS_BACKEND": BACKEND, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def command(images, folder, *more):
    """Runs train.py in this process; returns its exit status."""
    return train.main(flags(images, folder, *more))


def outcome(folder):
    """Everything of a finished run that has to be the same bits."""
    run = folder / "run" / "dskd" / "seed-0"
    metrics = json.loads((run / "metrics.json").read_text())
    for result in (metrics, metrics["teacher"]):
        for of_this_run in ("images_per_second", "seconds", "latency_ms", "command"):
            result.pop(of_this_run)
    (teacher,) = (folder / "teachers").glob("*.keras")
    return {
        "metrics": metrics,
        "history": (run / "history.csv").read_bytes(),
        "teacher's history": teacher.with_suffix("").joinpath("history.csv").read_bytes(),
        "confusion": (run / "confusion.csv").read_text(),
        "weights": [
            weight.tobytes()
            for path in (teacher, run / "student.keras")
            for weight in keras.models.load_model(path, compile=False).get_weights()
        ],
    }


@pytest.mark.slow
def test_killed_at_moments_of_all_kinds(images, tmp_path):
    moments = MOMENTS if BACKEND == "torch" else FEWER_MOMENTS
    # Nobody stops the first, and its checkpoints are at other steps.
    done = process("none", images, tmp_path / "a", "--checkpoint_steps", 1000)
    assert done.returncode == 0, done.stderr
    done = process(",".join([*moments, "none"]), images, tmp_path / "b", "--resume")
    assert done.stdout.strip().endswith(f"{len(moments)} killed, then none ended with 0"), done
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")
    for left in ("checkpoints", "*.tmp*", "*.unfinished*", "student_interrupted.keras"):
        assert not list(tmp_path.rglob(left)), left


@pytest.mark.slow
@pytest.mark.once
def test_a_killed_stream_goes_on_to_the_bits_of_the_images_in_memory(images, tmp_path):
    folder = tmp_path / "images"
    with np.load(images) as arrays:
        for part in ("train", "test"):
            pairs = zip(arrays[f"x_{part}"], arrays[f"y_{part}"], strict=True)
            for index, (image, label) in enumerate(pairs):
                file = folder / part / str(label) / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(file)
    done = process("none", folder, tmp_path / "memory")
    assert done.returncode == 0, done.stderr
    stream = ("--resume", "--stream", "--stream_workers", 1)
    done = process("teacher:step:3,student:step:7,none", folder, tmp_path / "stream", *stream)
    assert done.stdout.strip().endswith("2 killed, then none ended with 0"), done
    assert outcome(tmp_path / "stream") == outcome(tmp_path / "memory")


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The folder of a run that nobody stopped, and its outcome."""
    folder = tmp_path_factory.mktemp("finished")
    assert command(images, folder) == 0
    return folder, outcome(folder)


@pytest.fixture
def begun(finished, tmp_path):
    """A folder in which the teacher is there and the student is not begun."""
    shutil.copytree(finished[0] / "teachers", tmp_path / "teachers")
    return tmp_path


def after_steps(monkeypatch, steps, action):
    """Has `action` called after so many steps, before the checkpoint."""
    original = checkpoints.Checkpointer.on_train_batch_end

    def hooked(self, batch, logs=None):
        if self.steps(self.place_after(batch)) == steps:
            action()
        original(self, batch, logs)

    monkeypatch.setattr(checkpoints.Checkpointer, "on_train_batch_end", hooked)


@pytest.fixture(scope="module")
def stopped_once(finished, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(finished[0] / "teachers", folder / "teachers")
    with pytest.MonkeyPatch.context() as patched:
        after_steps(patched, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert command(images, folder) == 128 + signal.SIGTERM
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that was stopped by SIGTERM after its seventh step: the third of the second epoch."""
    shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run" / "dskd" / "seed-0"


def newest_first(run):
    return sorted((run / "checkpoints").iterdir(), reverse=True)


def test_a_signal_stops_after_the_step_and_loses_none(
    finished, stopped, images, monkeypatch, capsys
):
    assert [path.name[:14] for path in newest_first(stopped)] == [
        "step-000000007", "step-000000006"
    ]  # fmt: skip
    assert keras.models.load_model(stopped / "student_interrupted.keras").name == "resnet8"
    assert not (stopped / "student.keras").exists()
    assert not (stopped / "metrics.json").exists()

    # Once more, now by Ctrl-C, in the last step of an epoch: that one is finished first.
    folder = stopped.parents[2]
    with monkeypatch.context() as patched:
        after_steps(patched, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert command(images, folder, "--resume") == 128 + signal.SIGINT
    printed = capsys.readouterr().out
    assert "Continuing after epoch 1 of 3, step 3 of 4" in printed
    assert "Stopping after this step" in printed and "--resume goes on" in printed
    assert newest_first(stopped)[0].name.startswith("step-000000008")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    assert command(images, folder, "--resume") == 0
    assert "Continuing after epoch 2 of 3." in capsys.readouterr().out
    assert outcome(folder) == finished[1]


def test_images_on_the_device_go_on_to_the_bits_of_those_of_the_host(
    finished, images, tmp_path, monkeypatch, capsys
):
    # Two steps of the teacher's second epoch are from the device, and the rest from the host; of
    # the student it is the other way. Four steps run together where so many are left.
    device = ["--resume", "--augment_on", "device"]
    device += [] if BACKEND == "torch" else ["--steps_per_execution", "4"]
    two = [] if BACKEND == "torch" else ["--steps_per_execution", "2"]
    after_steps(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    runs = ["--augment_on", "device", *two], ["--resume"], device
    assert [command(images, tmp_path, *more) for more in runs] == [143, 143, 0]
    printed = capsys.readouterr().out
    assert "Continuing after epoch 1 of 3, step 2 of 4" in printed
    assert outcome(tmp_path) == finished[1]


@pytest.mark.slow
def test_half_precision_without_heads_goes_on_to_the_same_bits(
    begun, images, monkeypatch, tmp_path_factory
):
    # The third epoch has no heads. float16 has the scale of the loss to remember, which grows and
    # shrinks with the steps.
    monkeypatch.setattr(training, "_WORTH_A_COMPILATION", 1)
    precision = ["--dtype_policy", "mixed_float16", "--teacher_dtype", "bfloat16"]
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(begun / "teachers", whole / "teachers")
    assert command(images, whole, *precision) == 0
    with monkeypatch.context() as patched:
        after_steps(patched, 11, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert command(images, begun, *precision) == 128 + signal.SIGTERM
    assert command(images, begun, *precision, "--resume") == 0
    expected = outcome(whole)
    assert outcome(begun) == expected
    # The losses were float32's: each differs from its rounding to half precision.
    with open(whole / "run/dskd/seed-0/history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = np.array([float(row["loss"]) for row in rows])
    assert np.isfinite(losses).all() and (losses != losses.astype("float16")).all()
    deep = [row["deep_feature_loss/stage2"] for row in rows]
    assert float(deep[1]) > 0 and deep[2] == "NA"


@pytest.mark.once
def test_cached_views_go_on_to_the_same_bits(begun, images, monkeypatch, tmp_path_factory, capsys):
    views = ["--cached_views", "2"]
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(begun / "teachers", whole / "teachers")
    assert command(images, whole, *views) == 0
    assert len(list((whole / "teachers").glob("*.outputs/*.npy"))) == 2 * 3  # logits, two maps
    with monkeypatch.context() as patched:
        after_steps(patched, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert command(images, begun, *views) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert command(images, begun, *views, "--resume") == 0
    assert "Caching" not in capsys.readouterr().out, "the outputs are there"
    assert outcome(begun) == outcome(whole)
    # Other images than those of fresh augmentation.
    assert command(images, begun, "--run_dir", begun / "fresh", "--method", "kd") == 0
    assert command(images, begun, "--run_dir", begun / "fixed", "--method", "kd", *views) == 0
    fresh, fixed = (
        np.genfromtxt(begun / name / "kd/seed-0/history.csv", delimiter=",", names=True)["loss"]
        for name in ("fresh", "fixed")
    )
    assert not np.any(fresh == fixed)


@pytest.mark.once
def test_a_run_of_a_time_before_folding_is_not_taken_for_another(stopped, images, capsys):
    config = stopped / "config.yaml"
    fields = ("fold_teacher", "teacher_dtype", "dtype_policy")
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith(fields)))
    folder = stopped.parents[2]
    assert command(images, folder, "--resume") == 2
    assert "(fold_teacher: False there, True here)" in capsys.readouterr().err
    assert command(images, folder, "--resume", "--fold_teacher", "false") == 0


@pytest.mark.once
def test_an_interrupted_student_that_can_not_be_saved_is_said(begun, images, monkeypatch, capsys):
    def fail(run, student, path):
        raise OSError("the disk is away")

    after_steps(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(saved_models, "save_student", fail)
    assert command(images, begun) == 128 + signal.SIGINT
    said = "The student so far can't be saved (the disk is away); --resume goes on."
    assert said in capsys.readouterr().out


def test_histories_of_earlier_versions_go_on_counted_from_1():
    old = "epoch,loss\r\n0,2.5\r\n1,1.5\r\n"
    assert training._counted_from_1(old) == "epoch,loss\r\n1,2.5\r\n2,1.5\r\n"
    for text in ("epoch,loss\r\n1,2.5\r\n", "epoch,loss\r\n", ""):
        assert training._counted_from_1(text) == text


@pytest.mark.once
def test_two_signals_stop_at_once(begun, images, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after_steps(monkeypatch, 7, twice)
    assert command(images, begun) == 128 + signal.SIGINT
    newest = newest_first(begun / "run" / "dskd" / "seed-0")[0]
    assert newest.name.startswith("step-000000006")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.once
@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_is_passed_over(
    finished, stopped, images, monkeypatch, capsys, damage
):
    newest, before = newest_first(stopped)
    damage(newest)
    folder = stopped.parents[2]
    with monkeypatch.context() as patched:
        after_steps(patched, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert command(images, folder, "--resume") == 128 + signal.SIGTERM
    printed = capsys.readouterr().out
    assert f"A checkpoint is damaged and passed over: '{newest}.damaged'" in printed
    assert "Continuing after epoch 1 of 3, step 2 of 4" in printed
    # The damaged one is not among the newest two.
    whole = [path for path in newest_first(stopped) if path.suffix == ".npz"]
    assert [path.name[:14] for path in whole] == ["step-000000007", "step-000000006"]
    assert before in whole and newest not in whole
    assert command(images, folder, "--resume") == 0
    assert "passed over" not in capsys.readouterr().out
    assert outcome(folder) == finished[1]


@pytest.mark.once
def test_without_a_whole_checkpoint_nothing_is_overwritten(stopped, images, capsys):
    before = {
        path: path.read_bytes()
        for path in (stopped / "history.csv", stopped / "student_interrupted.keras")
    }
    for path in newest_first(stopped):
        flip(path)
    for _ in range(2):
        assert command(images, stopped.parents[2], "--resume") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: resume: no checkpoint in") and "without --resume" in error
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.once
def test_without_resume_an_interrupted_run_is_set_aside(finished, stopped, images, capsys):
    assert command(images, stopped.parents[2]) == 0
    assert "What was interrupted is set aside" in capsys.readouterr().out
    aside = stopped.with_name("seed-0.unfinished-1")
    assert len(newest_first(aside)) == 2 and (aside / "student_interrupted.keras").exists()
    assert outcome(stopped.parents[2]) == finished[1]


@pytest.mark.once
def test_resume_is_refused_where_anything_is_another(stopped, images, tmp_path, capsys):
    folder = stopped.parents[2]
    assert command(images, folder, "--resume", "--temperature", 3, "--momentum", 0.5) == 2
    error = capsys.readouterr().err
    assert "(temperature: 4.0 there, 3.0 here; momentum: 0.9 there, 0.5 here)" in error

    other = dict(np.load(images))
    other["x_train"] = 255 - other["x_train"]
    changed = tmp_path / "elsewhere" / images.name
    changed.parent.mkdir()
    np.savez(changed, **other)
    known = (stopped / "config.yaml").read_text()
    (stopped / "config.yaml").write_text(known.replace(str(images), str(changed)))
    teacher = next((folder / "teachers").glob("*.keras"))
    # A teacher of other images has another key; this one is given.
    (stopped / "config.yaml").write_text(
        known.replace(str(images), str(changed)).replace(
            "teacher_weights: null", f"teacher_weights: {teacher}"
        )
    )
    assert command(changed, folder, "--resume", "--teacher_weights", teacher) == 2
    error = capsys.readouterr().err
    assert "resume: the run in" in error and "another training images:" in error


@pytest.mark.once
def test_another_backend_is_refused_before_a_teacher_trains_for_it(
    stopped, images, monkeypatch, capsys
):
    monkeypatch.setattr(training.keras.backend, "backend", lambda: "another")
    folder = stopped.parents[2]
    shutil.rmtree(folder / "teachers")
    assert command(images, folder, "--resume") == 2
    error = capsys.readouterr().err.strip()
    assert f"another KERAS_BACKEND: {BACKEND} there, another here" in error and "\n" not in error
    assert not (folder / "teachers").exists()


@pytest.mark.once
def test_another_process_in_the_same_folder(stopped, images, capsys):
    holding = (
        "import filelock, sys\n"
        "lock = filelock.FileLock(sys.argv[1])\n"
        "lock.acquire()\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, stopped.with_name(".seed-0.lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == b"locked\n"
        assert command(images, stopped.parents[2], "--resume") == 2
        other.stdin.close()
    assert "run_dir: another process is working in" in capsys.readouterr().err
    assert len(newest_first(stopped)) == 2


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize(
    "moment, kept",
    [
        ("student:full:3", {"step-000000002"}),
        ("student:unsaved:0", {"step-000000010", "step-000000012"}),
    ],
)
def test_a_full_disk_loses_nothing(finished, begun, images, moment, kept):
    # From this moment on files of more than 1000 bytes can't be written.
    done = process(moment, images, begun)
    run = begun / "run" / "dskd" / "seed-0"
    assert done.returncode == 1, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: can't write to") and "--resume goes on from it" in error
    assert {path.name[:14] for path in (run / "checkpoints").iterdir()} == kept
    assert command(images, begun, "--resume") == 0
    assert outcome(begun) == finished[1]


@pytest.mark.once
def test_a_real_full_disk_and_one_that_is_read_only(finished, begun, images, capsys):
    if shutil.which("mount") is None:
        pytest.skip("there is no command to mount a file system")
    disk = begun / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        flags = ["--run_dir", disk / "run"]
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert command(images, begun, *flags) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: run_dir: can't write") and "Read-only file system" in error
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        filler = disk / "filler"
        filler.write_bytes(bytes(1_000_000))
        assert command(images, begun, *flags) == 1
        error = capsys.readouterr().err.strip()
        assert "No space left on device" in error and "\n" not in error
        filler.unlink()
        assert command(images, begun, *flags, "--resume") == 0
        shutil.copytree(disk / "run", begun / "run")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert outcome(begun) == finished[1]


@pytest.mark.once
def test_a_weight_that_is_not_finite_is_not_saved(begun, images, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        original = checkpoints._values
        seen = []

        def spoilt(variables):
            values = original(variables)
            seen.append(values)
            if len(seen) > 3:
                values[0][...] = np.nan
            return values

        patched.setattr(checkpoints, "_values", spoilt)
        assert command(images, begun) == 1
    error = capsys.readouterr().err.strip()
    assert "is no longer finite" in error and "learning_rate" in error and "\n" not in error
    assert len(newest_first(begun / "run" / "dskd" / "seed-0")) == 1


def test_a_loss_that_is_not_finite_stops_the_run(begun, images, capsys):
    flags = ["--learning_rate", 1e30, "--teacher_learning_rate", 0.05]
    assert command(images, begun, *flags) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "epoch 1, step" in error and "\n" not in error


@pytest.mark.once
def test_resume_begins_a_run_that_was_not_begun_and_keeps_a_finished_one(finished, images, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.keras")}
    assert command(images, folder, "--resume") == 0
    assert "Seed 0 was finished before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
