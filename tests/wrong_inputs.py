"""What users and disks get wrong: a table of commands, files, and what has to be said of them."""

import functools
import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from dskd_keras.experiment.command_line import parse
from dskd_keras.experiment.config import ExperimentConfig
from dskd_keras.report import RunResult
from dskd_keras.tuning.config import SearchConfig

CLASSES = ("ant", "bee", "cat")
MODELS = ("--teacher", "resnet8", "--student", "resnet8")
RUN = (
    *MODELS, "--dataset", "images.npz", "--epochs", "1", "--batch_size", "16", "--run_dir", "run",
    "--teacher_dir", "teachers",
)  # fmt: skip
CE = (*RUN, "--method", "ce")
SEARCH = (*CE, "--max_trials", "1", "--validation_fraction", "0.25")
LONG = "n" * 300
UNDECODABLE = "caf\udce9"
# In a seed's folder.
SEED = "run/ce/seed-0"


class Case(NamedTuple):
    """A command in a folder, and how it has to end."""

    argv: tuple[str, ...]
    says: str  # within the one line of standard error; "" where there is none
    make: Any = None  # a function that is given the folder, which holds images.npz
    command: str = "train"
    status: int = 2
    output: str = "stdout"  # as for `Warmed.run`
    writes: tuple[str, ...] = ()  # what may be new or changed afterwards, with all inside


def images(folder, name="images.npz", drop=(), **changes):
    """Writes 8×8 images of three classes."""
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array(CLASSES)}
    for part, count in (("train", 12), ("test", 6)):
        arrays[f"x_{part}"] = rng.integers(0, 255, (count, 8, 8, 3)).astype("uint8")
        arrays[f"y_{part}"] = np.arange(count) % len(CLASSES)
    arrays |= changes
    np.savez(folder / name, **{key: arrays[key] for key in arrays if key not in drop})


def npz(**changes):
    return lambda folder: images(folder, **changes)


def labels(*values, **changes):
    given = np.arange(12) % 3
    given[: len(values)] = values
    return npz(y_train=given, drop=("class_names",), **changes)


def file(name, content):
    """Returns the function that writes a file."""

    def make(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def fifo(name):
    def make(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)

    return make


def both(*makers):
    def make(folder):
        for maker in makers:
            maker(folder)

    return make


def config(text):
    """Returns the case of a file for --config."""
    argv = (*MODELS, "--config", "mine.yaml")
    return functools.partial(Case, argv, make=file("mine.yaml", text))


def png(folder, name="colour.png", width=8, height=8):
    """Writes an image, whose header may lie."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    pixels = b"".join(b"\0" + bytes(3 * min(width, 9)) for _ in range(min(height, 9)))
    rows = zlib.compress(pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def class_folders(folder, names=("a", "b")):
    for name in names:
        for number in range(5):
            png(folder / "classes" / name, f"{number}.png")


def in_folders(change=None, names=("a", "b")):
    def make(folder):
        class_folders(folder, names)
        if change:
            change(folder)

    return make


FOLDERS = (*MODELS, "--dataset", "classes", "--method", "ce", "--run_dir", "run")


def declares(shape, kind="<f8"):
    """The bytes of an .npy file whose header promises more than there is."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": kind, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + b"\0" * 64


def archive(name, **members):
    def make(folder):
        with zipfile.ZipFile(folder / name, "w") as zipped:
            for member, content in members.items():
                zipped.writestr(f"{member}.npy", content)

    return make


def result(**changes):
    known = dict(
        test_accuracy=0.75, best_accuracy=0.8, best_epoch=1, best_chosen_on="test", epochs=1,
        seed=0, backend="torch", dataset="images",
    )  # fmt: skip
    return json.loads(RunResult("ce", "resnet8", 77850, **known).to_json()) | changes


def finished(argv=CE, **changes):
    """Returns the function that writes a finished run, some files of it given as text."""

    def make(folder):
        seed = folder / SEED
        seed.mkdir(parents=True)
        contents = {
            "config.yaml": parse(ExperimentConfig, [*argv], "train").to_yaml(),
            "history.csv": "epoch,accuracy,loss,val_accuracy\n1,0.5,1.0,0.75\n",
            "metrics.json": json.dumps(result()),
            "confusion.csv": "true \\ predicted,ant,bee\nant,1,0\nbee,0,1\n",
            **{key.replace("_", ".", 1): text for key, text in changes.items()},
        }
        for name, text in contents.items():
            (seed / name).write_text(text) if text is not None else None

    return make


def metrics(**changes):
    return finished(metrics_json=json.dumps(result(**changes)))


def search(argv=SEARCH, **texts):
    """Returns the function that writes a search's folder, with some files given as text."""

    def make(folder):
        place = folder / "run" / "search"
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(parse(SearchConfig, [*argv], "tune").to_yaml())
        for name, text in texts.items():
            (place / name.replace("_", ".", 1)).write_text(text)

    return make


def lost_oracle(folder):
    search()(folder)
    (folder / "run/search/trial_0000").mkdir()
    (folder / "run/search/trial_0000/config.yaml").write_text("epochs: 1\n")


def checkpoint(content):
    """Returns the function that writes an unfinished run with a checkpoint of some content."""

    def make(folder):
        finished(metrics_json=None, confusion_csv=None)(folder)
        place = folder / SEED / "checkpoints"
        place.mkdir()
        checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
        (place / f"step-000000001.{checksum}.npz").write_bytes(content)

    return make


def another_archive():
    file = io.BytesIO()
    np.savez(file, x=np.zeros(3))
    return file.getvalue()


def bomb(levels=9):
    """A YAML text of lists that each hold the one before nine times."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]")
    return "\n".join([*lines, f"seeds: *a{levels - 1}", ""])


def numbers():
    """Settings that no training can have, each with its error."""
    big = "9" * 21
    for field, value, says in (
        ("epochs", big, f"epochs: {big} should be a whole number from 1 to"),
        ("epochs", "-1", "epochs: -1 should be"),
        ("epochs", "1e3", "epochs: '1e3' should be a whole number"),
        ("epochs", "true", "epochs: "),
        ("epochs", "1.5", "epochs: '1.5' should be a whole number"),
        ("batch_size", big, f"batch_size: {big} should be a whole number from 1 to"),
        ("image_size", big, f"image_size: {big} should be a whole number from 1 to"),
        ("image_size", "100000", "image_size: 100000 should be a whole number from 1 to"),
        ("train_examples", big, f"train_examples: {big} should be"),
        ("checkpoint_steps", big, f"checkpoint_steps: {big} should be"),
        ("steps_per_execution", "0", "steps_per_execution: 0 should be a whole number"),
        ("steps_per_execution", "2", "steps_per_execution: 2, but Keras runs steps one by one on"),
        ("augment_on", "gpu", "augment_on: 'gpu' should be a known name. Choices: host, device"),
        ("teacher_epochs", big, f"teacher_epochs: {big} should be"),
        ("teacher_seed", str(2**32), f"teacher_seed: {2**32} should be a whole number from 0 to"),
        ("seeds", str(2**32), f"seeds: [{2**32}] should be different whole numbers from 0 to"),
        ("seeds", "-1", "seeds: [-1] should be different whole numbers"),
        ("seeds", "[true, 2]", "seeds: "),
        ("seeds", ", ".join(map(str, range(2000))), "seeds: 2,000 values, "),
        ("seeds", f"[{'[' * 3000}{']' * 3000}]", "seeds: '[[["),
        ("weight_decay", "1e308", "weight_decay: 1e+308 should be"),
        ("learning_rate", "1e300", "learning_rate: 1e+300 should be"),
        ("learning_rate", "1e-300", "learning_rate: 1e-300 should be"),
        ("teacher_learning_rate", "1e300", "teacher_learning_rate: 1e+300 should be"),
        ("decay_factor", "1e-310", "decay_factor: 1e-310 should be"),
        ("momentum", "nan", "momentum: "),
        ("temperature", "1e-320", "temperature: "),
        ("temperature", "1e-38", "temperature: 1e-38 should be"),
        ("temperature", "1e38", "temperature: 1e+38 should be"),
        ("temperature", "1e400", "temperature: "),
        ("weighting_temperature", "1e-320", "weighting_temperature: "),
        ("label_weight", "1e39", "label_weight: 1e+39 should be"),
        ("prediction_weight", "1e308", "prediction_weight: 1e+308 should be"),
        ("deep_prediction_weight", "-1e-9", "deep_prediction_weight: -1e-09 should be"),
        ("deep_feature_weight", ".nan", "deep_feature_weight: nan should be"),
        ("deep_supervision", "1e-320", "deep_supervision: 1e-320 should be"),
        ("decay_at", ".nan", "decay_at: [nan] should be shares"),
        ("min_teacher_accuracy", "75", "min_teacher_accuracy: 75.0 should be"),
        ("validation_fraction", ".inf", "validation_fraction: inf should be"),
    ):  # fmt: skip
        yield f"{field} {value[:25]}", Case((*RUN, f"--{field}", value), says)


def names():
    """Texts that are no names of files or folders."""
    for field in ("dataset", "data_dir", "run_dir", "teacher_dir", "teacher_weights", "pair"):
        for what, value in {
            "long": LONG,
            "undecodable": UNDECODABLE,
            "line break": "two\nlines",
            "escape": "a\x1b[31m",
            "empty": "",
        }.items():
            if (field, what) != ("pair", "undecodable"):
                yield f"{field} {what}", Case((*RUN, f"--{field}", value), f"{field}: ")
    for field in ("run_dir", "dataset", "teacher_weights", "data_dir"):
        case = config(f'{field}: "a\\0b"\n')(f"{field}: 'a\\x00b' should be")
        yield f"{field} null byte", case
    yield "config long", Case((*RUN, "--config", LONG), f"config: can't read '{LONG}': File name")
    yield "config undecodable", Case((*RUN, "--config", UNDECODABLE), "config: can't read 'caf")
    yield "option escape", Case((*RUN, "--\x1b[31m"), "option: '--\\x1b[31m' should be")
    layers = ("--student_layers", "[stage1, '']")
    yield "a layer without a name", Case((*RUN, *layers), "student_layers: '' should be a known")
    twice = ("--pair", "resnet20_resnet8", "--pair=vgg13_vgg8")
    yield "pair twice", Case(twice, "pair: given twice, 'resnet20_resnet8' and 'vgg13_vgg8'")
    yield "pair elsewhere", config("pair: ../up\n")("pair: '../up' should be a name")


def yaml_files():
    """Files for --config."""
    for name, text, says in (
        ("empty", "", "config: 'mine.yaml' should hold fields"),
        ("only a comment", "# nothing\n", "config: 'mine.yaml' should hold fields"),
        ("binary", bytes(range(256)), "config: 'mine.yaml' should be a text file"),
        ("control characters", "epochs: \x01\n", "config: 'mine.yaml' should be valid YAML"),
        ("key twice", "epochs: 1\nepochs: 2\n",
         "config: 'mine.yaml', line 2 should be valid YAML: 'epochs' is given twice"),
        ("inner key twice", "ranges: {a: 1, a: 2}\n", "'a' is given twice"),
        ("aliases", bomb(), "config: 'mine.yaml', line 2 should be valid YAML: "),
        ("an alias of itself", "seeds: &a [*a]\n", "should be valid YAML: "),
        ("deep", f"seeds: {'[' * 3000}{']' * 3000}\n", "config: 'mine.yaml', line 1 should be"),
        ("deep mappings", f"{'{a: ' * 3000}{'}' * 3000}\n", "config: 'mine.yaml', line 1 should"),
        ("many seeds", f"seeds: [{', '.join(map(str, range(300_000)))}]\n",
         "config: 'mine.yaml' should be a file of at most 100,000 bytes"),
        ("code", "epochs: !!python/object/apply:os.system ['true']\n", "line 1 should be valid"),
        ("a list as key", "? [a, b]\n: 1\n", "line 1 should be valid YAML: "),
        ("a number as key", "3: 4\n", "config 'mine.yaml': 3 should be a known name"),
        ("a date", "epochs: 2020-01-01\n", "epochs: datetime.date(2020, 1, 1) should be"),
        ("a yes", "epochs: yes\n", "epochs: True should be a whole number"),
        ("a yes among seeds", "seeds: [yes, 2]\n", "seeds: [True, 2] should be a list, each"),
        ("a number as name", "run_dir: [1]\n", "run_dir: [1] should be a name"),
        ("a list for a number", "epochs: [1]\n", "epochs: [1] should be a whole number"),
        ("a null", "epochs: null\n", "epochs: None should be a whole number"),
        ("two documents", "epochs: 1\n---\nepochs: 2\n", "line 2 should be valid YAML"),
        ("a large number", f"epochs: {'9' * 5000}\n", "should be valid YAML: a number or a date"),
        ("a long value", f"method: {'x' * 5000}\n", "method: 'xxx"),
        ("an empty list", "seeds: []\n", "seeds: [] should be different whole numbers"),
        ("windows", b"\xff\xfee\x00p\x00", "config: 'mine.yaml' should be a text file"),
    ):  # fmt: skip
        yield f"yaml {name}", config(text)(says)
    yield "yaml folder", Case((*RUN, "--config", "."), "config: '.' should be a regular file")
    yield "yaml fifo", Case((*RUN, "--config", "pipe"), "config: 'pipe' should be a regular",
                            fifo("pipe"))  # fmt: skip
    yield "yaml device", Case((*RUN, "--config", "/dev/zero"), "'/dev/zero' should be a regular")
    yield "yaml of nobody", Case((*RUN, "--config", "none/x.yaml"), "config: can't read 'none/x")


def data():
    """Data sets."""
    nan = np.full((12, 8, 8, 3), np.nan, "float32")
    none = np.zeros((0, 8, 8, 3), "uint8")
    for name, make, says in (
        ("a label of 2**31 - 2", labels(2147483646), "label 2147483646"),
        ("a label of a million", labels(1_000_000), "label 1000000"),
        ("a negative label", labels(-1), "y_train: labels from -1 to 2 should"),
        ("a label of 2**40", labels(2**40), "32 bits"),
        ("one class", npz(class_names=np.array(["a"])), "has 1 class(es)"),
        ("labels beyond the names", npz(class_names=np.array(["a", "b"])), "labels from 0 to 2"),
        ("labels of fractions", npz(y_train=np.full(12, 0.5)), "of integers from 0"),
        ("equal class names", npz(class_names=np.array(["ant", "bee", "ant"])),
         "class_names in images.npz: 'ant' is the name of two classes"),
        ("an empty class name", npz(class_names=np.array(["ant", "bee", ""])), "class_names: ''"),
        ("a name that is no text", npz(class_names=np.array(["a", "b", "\udce9"])),
         "class_names: '\\udce9' should be"),
        ("many class names", npz(class_names=np.arange(20_000)), "20,000 classes"),
        ("numbers that are none", npz(x_train=nan), "2304 of 2304 values are not finite"),
        ("infinite numbers", npz(x_train=np.full_like(nan, np.inf)), "not finite"),
        ("no image", npz(x_train=none, y_train=np.zeros(0, "int64")), "none of them 0"),
        ("other channels in the test", npz(x_test=np.zeros((6, 8, 8, 1), "uint8")), "x_test: "),
        ("other sizes in the test", npz(x_test=np.zeros((6, 9, 8, 3), "uint8")), "x_test: "),
        ("fewer labels", npz(y_train=np.arange(5) % 3), "y_train: shape (5,)"),
        ("objects", npz(x_train=np.array([{}] * 12, dtype=object)), "can't be read as a .npz"),
        ("complex numbers", npz(x_train=np.zeros((12, 8, 8, 3), "complex64")), "complex64"),
        ("channels first", npz(x_train=np.zeros((12, 3, 8, 8), "uint8")), "channels should come"),
        ("a header of 171 PiB",
         archive("images.npz", x_train=declares((12, 10**8, 10**7, 2))), "can't be read"),
        ("a header of 2**70",
         archive("images.npz", x_train=declares((2**70,))), "can't be read as a .npz"),
        ("a header that is no header",
         archive("images.npz", x_train=b"\x93NUMPY\x01\x00\xff\xff{"), "can't be read as a .npz"),
        ("text", file("images.npz", "text"), "can't be read as a .npz archive"),
        ("nothing", file("images.npz", ""), "can't be read as a .npz archive"),
        ("another zip", archive("images.npz", a=b"x"), "images.npz"),
        ("a single pixel", npz(x_train=np.zeros((12, 1, 1, 3), "uint8"),
                               x_test=np.zeros((6, 1, 1, 3), "uint8")),
         "image_size: None, but the images are 1×1, and resnet8 needs"),
    ):  # fmt: skip
        yield f"npz: {name}", Case(CE, says, make)
    says = "dataset: pipe.npz should be a regular file"
    yield "npz: fifo", Case((*CE, "--dataset", "pipe.npz"), says, fifo("pipe.npz"))
    yield "npz: folder", Case((*CE, "--dataset", "x.npz"), "dataset: ", file("x.npz/a", ""))
    says = "image_size: 1, but resized to it the images are 1×1, and resnet8 needs 8×8"
    yield "image_size 1", Case((*CE, "--image_size", "1"), says)
    yield "train_examples 1", Case((*CE, "--train_examples", "1"), "train_examples: 1 should be")
    yield "validation_fraction", Case((*CE, "--validation_fraction", "0.01"), "validation_frac")

    def fifo_among_images(folder):
        os.mkfifo(folder / "classes/a/9.png")

    def dangling(folder):
        (folder / "classes/a/9.png").symlink_to("nowhere.png")

    def header(folder):
        png(folder / "classes/a", "9.png", 2**30, 2**30)

    for name, make, says in (
        ("a fifo", in_folders(fifo_among_images), "classes/a/9.png is no regular file"),
        ("a link to nothing", in_folders(dangling), "classes/a/9.png is no regular file"),
        ("a folder", in_folders(file("classes/a/9.png/x", "")), "9.png is no regular file"),
        ("a header of 2**60 pixels", in_folders(header), "9.png can't be read as an image"),
        ("an empty image", in_folders(file("classes/a/9.png", "")), "can't be read as an image"),
        ("half an image", in_folders(file("classes/a/9.png", b"\x89PNG\r\n\x1a\n\0\0")), "9.png"),
        ("an undecodable name", in_folders(names=("a", UNDECODABLE)), "class_names: 'caf\\udce9'"),
        ("one class", in_folders(names=("a",)), "has 1 class(es)"),
        ("another size", in_folders(lambda f: png(f / "classes/a", "9.png", 4, 8)), "differ in"),
    ):
        yield f"folder: {name}", Case(FOLDERS, says, make)


def run_folders():
    """What a run finds in its folder."""
    deep = "[" * 100_000
    for name, text in {
        "a list": "- 1\n", "brackets": "[" * 3000, "binary": "\0\x01", "a key twice": "a: 1\na: 2",
        "nothing": "",
    }.items():  # fmt: skip
        make = finished(config_yaml=text)
        yield f"config.yaml: {name}", Case(CE, f"run_dir: '{SEED}/config.yaml'", make)
    for name, text in {
        "brackets": deep, "a list": "[1]", "nothing": "", "half": '{"method": "ce"',
        "null": "null", "a number": "1e999",
    }.items():  # fmt: skip
        yield f"metrics.json: {name}", Case(CE, f"'{SEED}/metrics.json'",
                                            finished(metrics_json=text))  # fmt: skip
    yield "metrics.json: 750 %", Case(CE, "$.test_accuracy", metrics(test_accuracy=7.5))
    yield "metrics.json: no number", Case(CE, "test_accuracy", metrics(test_accuracy=float("nan")))
    for name, content in {
        "another archive": another_archive(), "text": b"text", "nothing": b"",
    }.items():  # fmt: skip
        yield f"checkpoint: {name}", Case((*CE, "--resume"), "resume: no checkpoint in",
                                          checkpoint(content), writes=("run",))  # fmt: skip
    yield "run_dir: a file", Case((*CE, "--run_dir", "images.npz"), "run_dir: can't ")
    yield "run_dir: a device", Case((*CE, "--run_dir", "/dev/null"), "run_dir: can't ")
    yield "run_dir: /proc", Case((*CE, "--run_dir", "/proc/run"), "run_dir: can't write")
    yield "teacher_dir: a device", Case((*RUN, "--teacher_dir", "/dev/null"), "teacher_dir: can't",
                                        writes=("run",))  # fmt: skip


def reports():
    """What the report is given."""
    report = functools.partial(Case, command="report")
    made = ("run",)  # pictures and the page
    for target, make in {
        "/dev/full": finished(), "/dev/null": finished(), "pipe": both(finished(), fifo("pipe")),
        "link": both(finished(), lambda folder: (folder / "link").symlink_to("/dev/full")),
    }.items():  # fmt: skip
        says = f"output: '{target}' is no regular file"
        yield f"report to {target}", report(("run", "--output", target), says, make)
    for target, says in {
        "/new/page.html": "output: there is no folder '/new'",
        "new/deep/page.html": "output: there is no folder 'new/deep'",
        "images.npz/page.html": "output: there is no folder 'images.npz'",
        "run": "output: 'run' is a folder",
        "/proc/page.html": "output: can't write",
        "": "output: '' should be a path",
        LONG: "output: ",
        UNDECODABLE: "output: 'caf\\udce9' should be",
        "\x1b[31m": "output: '\\x1b[31m' should be",
    }.items():  # fmt: skip
        writes = made if "/proc" in target else ()
        yield f"report to {target[:20]}", report(("run", "--output", target), says, finished(),
                                                 writes=writes)  # fmt: skip
    for argv, says in (
        ((), "the following arguments are required: RUN_DIR"),
        (("run", "--title", "x"), "unrecognized arguments: --title x"),
        (("run", "--output"), "--output: expected one argument"),
        (("images.npz",), "run_dir: 'images.npz' is a file"),
        (("",), "run_dir: '' should be a path"),
        ((LONG,), "run_dir: "),
        ((UNDECODABLE,), "run_dir: "),
        (("/dev/null",), "run_dir: '/dev/null' is a file"),
        (("none\x1b[31m",), "run_dir: 'none\\x1b[31m' should be"),
    ):
        yield f"report {' '.join(argv)[:20]!r}", report(argv, says, finished())
    # What is damaged is passed over, and said in the page and the table.
    for name, make in {
        "metrics.json of brackets": finished(metrics_json="[" * 100_000),
        "metrics.json of 750 %": metrics(test_accuracy=7.5),
        "metrics.json with escapes": metrics(model="\x1b[31mred"),
        "config.yaml of brackets": finished(config_yaml="[" * 3000),
        "config.yaml of aliases": finished(config_yaml=bomb()),
        "confusion.csv of letters": finished(confusion_csv="x,a,b\na,x,0\nb,0,1\n"),
        "confusion.csv of large numbers": finished(
            confusion_csv=f"x,a,b\na,{'9' * 30},0\nb,0,1\n"),
        "confusion.csv of a long number": finished(
            confusion_csv=f"x,a,b\na,{'9' * 5000},0\nb,0,1\n"),
        "confusion.csv of bytes": finished(confusion_csv="\0\0"),
        "confusion.csv of a large cell": finished(confusion_csv="x" * 200_000),
        "history.csv of nothing": finished(history_csv=""),
        "history.csv of bytes": finished(history_csv="\0\1epoch"),
        "history.csv of a large cell": finished(history_csv="x" * 200_000 + "\n"),
        "history.csv of large epochs": finished(history_csv="epoch,loss\n1e308,1\n"),
        "history.csv of large numbers": finished(
            history_csv="epoch,loss,val_accuracy\n1,1e308,-7e307\n"),
        "history.csv without epochs": finished(history_csv="loss\n1\n"),
        "metrics.json as a pipe": both(finished(metrics_json=None), fifo(f"{SEED}/metrics.json")),
        "config.yaml as a folder": both(
            finished(config_yaml=None), file(f"{SEED}/config.yaml/x", "")),
        "metrics.json in a circle": both(finished(metrics_json=None), lambda folder: (
            folder / SEED / "metrics.json").symlink_to("metrics.json")),
    }.items():  # fmt: skip
        yield f"report: {name}", report(("run",), "", make, status=0, writes=made)
    yield "report to a pipe that is closed", report(("run",), "", finished(), status=0,
                                                    output="pipe", writes=made)  # fmt: skip
    yield "report to a closed output", report(("run",), "", finished(), status=0,
                                              output="closed", writes=made)  # fmt: skip
    full = functools.partial(Case, says="standard output: No space left on device", status=1,
                             output="/dev/full")  # fmt: skip
    yield "report to a full output", full(("run",), make=finished(), command="report",
                                          writes=made)  # fmt: skip
    for command in ("train", "tune"):
        for flag in ("--help", "--print_config"):
            name, argv = f"{command} {flag} to ", (*RUN, flag)
            yield f"{name}a full output", full(argv, command=command)
            for output in ("closed", "pipe"):
                yield name + output, Case(argv, "", command=command, status=0, output=output)
    yield "a finished run to a full output", full(CE, make=finished(), writes=made)
    yield "a finished run to a closed output", Case(CE, "", finished(), status=0, writes=made,
                                                    output="closed")  # fmt: skip
    # Long words of a file are not repeated.
    yield (
        "an error to a full output",
        Case((*RUN, "--epochs", "0"), "epochs: 0", output="/dev/full"),
    )


def searches():
    """What a search is given, and what it finds in its folder."""
    tune = functools.partial(Case, command="tune")
    for argv, says in (
        (("--ranges.student_layers", "[[stage1]]"), "ranges.student_layers: [['stage1']], but met"),
        (("--augment_on", "device"), "augment_on: device, but a search makes its batches on the"),
        (("--search_seed", str(2**32)), f"search_seed: {2**32} should be a whole number from 0 to"),
        (("--search_seed", str(2**32 - 1)), "search_seed: 4294967295 should be a whole number"),
        (("--max_trials", "9" * 21), "max_trials: "),
        (("--workers", "9" * 21), "workers: "),
        (("--chief_timeout", "1e308"), "chief_timeout: "),
        (("--worker_timeout", "nan"), "worker_timeout: "),
        (("--ranges.temperature", "1e-320", "1"), "ranges.temperature: "),
        (("--ranges.temperature", "1", "1e308"), "ranges.temperature: "),
        (("--ranges.learning_rate", "0.1", "1e300"), "ranges.learning_rate: "),
        (("--ranges.learning_rate", "true", "2"), "ranges.learning_rate: "),
        (("--ranges.weighting", "softmax", "softmax"), "ranges.weighting: "),
        (("--ranges", "x"), "option: '--ranges' should be a known name"),
        (("--ranges.temperature", "1", "2", "3"), "ranges.temperature: "),
        (("--resume", "maybe"), "resume: 'maybe' should be true or false"),
    ):
        yield f"tune {' '.join(argv)[:40]}", tune((*SEARCH, *argv), says)
    brackets, resumed = "[" * 100_000, (*SEARCH, "--resume")
    for name, text in {"brackets": brackets, "a list": "[]", "half": "{", "nothing": "",
                       "an empty object": "{}"}.items():  # fmt: skip
        yield f"search.json: {name}", tune(SEARCH, "run_dir: 'run/search/search.json' is damaged",
                                           search(search_json=text))  # fmt: skip
        yield f"oracle.json: {name}", tune(resumed, "run_dir: 'run/search/oracle.json' is damaged",
                                           search(oracle_json=text), writes=("run",))  # fmt: skip
    inner = json.dumps({"oracle": [], "trials": [3], "deaths": {}})
    yield "oracle.json: another", tune(resumed, "run_dir: 'run/search/oracle.json' is damaged",
                                       search(oracle_json=inner), writes=("run",))  # fmt: skip
    yield "oracle.json lost", tune(resumed, "resume: 'run/search/oracle.json', which", lost_oracle,
                                   writes=("run/.search.lock",))  # fmt: skip
    for name, text in {"brackets": brackets[:3000], "a list": "- 1", "nothing": ""}.items():
        says, make = "resume: 'run/search/environment.yaml'", search(environment_yaml=text)
        yield f"environment.yaml: {name}", tune(resumed, says, make, writes=("run",))
    yield "search: config.yaml", tune(SEARCH, "run_dir: 'run/search/config.yaml'", both(
        search(), file("run/search/config.yaml", "[" * 3000)))  # fmt: skip


def teachers():
    """Files of teachers."""
    import keras

    from dskd_keras import models

    def saved(name, change=None, model="resnet8", classes=3, weights=False):
        def make(folder):
            teacher = models.create(model, classes, (8, 8, 3))
            teacher = teacher if change is None else change(teacher)
            (teacher.save_weights if weights else teacher.save)(folder / name)

        return make

    def broken(teacher):
        teacher.set_weights([weight * np.nan for weight in teacher.get_weights()])
        return teacher

    def with_lambda(teacher):
        images = keras.Input((8, 8, 3))
        return keras.Model(images, keras.layers.Lambda(lambda x: 2 * x)(teacher(images)))

    config = json.dumps({"class_name": "Functional", "config": {}})
    for name, make, says in (
        ("nan.keras", saved("nan.keras", broken), "has values that are not finite in 'stem_conv/k"),
        ("nan.weights.h5", saved("nan.weights.h5", broken, weights=True), "not finite in 'stem"),
        ("lambda.keras", saved("lambda.keras", with_lambda),
         "it holds the code of a Lambda layer. Code in a file is never run."),
        ("seven.weights.h5", saved("seven.weights.h5", classes=7, weights=True),
         "of other layers: 'logits' has shape (64, 7) there and (64, 3) here."),
        ("other.weights.h5", saved("other.weights.h5", model="resnet14", weights=True),
         "it holds the weights of other layers"),
        ("seven.keras", saved("seven.keras", classes=7), "to 7 classes, where"),
        ("text.keras", file("text.keras", "x"), "can't load"),
        ("empty.keras", archive("empty.keras"), "can't load"),
        ("zip.keras", archive("zip.keras", a=b"x"), "can't load"),
        ("text.weights.h5", file("text.weights.h5", "x"), "can't load"),
        ("deep.keras", members("deep.keras", config="[" * 100_000), "can't load"),
        ("other.keras", members("other.keras", config=config), "can't load"),
        ("text.pth", file("text.pth", "x"), "is no PyTorch checkpoint"),
        ("pipe.keras", fifo("pipe.keras"), "there is no file"),
        ("x.onnx", file("x.onnx", "x"), "should be a .keras or a .weights.h5 file"),
    ):  # fmt: skip
        yield f"teacher {name}", Case((*RUN, "--teacher_weights", name), f"{says}", make,
                                      writes=("run",))  # fmt: skip


def members(name, config):
    """Returns the function that writes a .keras file of some configuration."""

    def make(folder):
        with zipfile.ZipFile(folder / name, "w") as zipped:
            zipped.writestr("config.json", config)
            zipped.writestr("metadata.json", "{}")
            zipped.writestr("model.weights.h5", "x")

    return make


def benchmarks():
    """Arguments of a benchmark."""
    for argv, says in (
        (("--pair", "resnet20_resnet9"), "pair: 'resnet20_resnet9' should be a known name"),
        (("--rounds", "0"), "rounds"),
        (("--steps", "many"), "steps"),
        (("--nothing", "1"), "nothing"),
        (("--only", "nothing", "--pair", "resnet20_resnet8"), "only: 'nothing' should be a known"),
        (("--half", "int8"), "half"),
    ):
        yield f"step {' '.join(argv)}", Case(argv, says, command="step")


CASES: dict[str, Case] = {}
for table in (
    numbers, names, yaml_files, data, run_folders, reports, searches, teachers, benchmarks,
):  # fmt: skip
    CASES |= dict(table())
