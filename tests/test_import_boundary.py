"""What `import dskd_keras` brings in, what can be reached from it, and that all of it is typed."""

import importlib
import inspect
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import small

import dskd_keras

ROOT = Path(dskd_keras.__file__).parent.parent

GROUND = ["_lazy", "checks", "errors", "progress"]
CORE = [
    "coefficients", "copying", "depthwise", "distiller", "endings", "ensemble", "feature_maps",
    "folding", "freezing", "fused_normalization", "graph", "heads", "inputs", "keras_internals",
    "labels",
    "losses", "maps", "naming", "objective", "optimizers", "pairing", "replicas", "teacher",
    "term_means", "terms", "traced_training", "tracing", "walking", "weighting",
]  # fmt: skip


def fresh(script, *arguments, **environment):
    """What a script prints, as JSON, in a process of its own."""
    inherited = {k: v for k, v in os.environ.items() if k != "DSKD_KERAS_DEFER"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained distiller, images, and the folder that it and its student were saved to."""
    keras.utils.set_random_seed(0)
    x, y = small.images(4)
    distiller = dskd_keras.Distiller(
        dskd_keras.fold_batch_norm(small.convnet("teacher", width=5)),
        small.convnet("student"),
        ["stage1"],
        weighting="inverse",
    )
    distiller.compile(dskd_keras.optimizers.SGD(0.1, momentum=0.9), loss=small.crossentropy())
    with small.eagerly():
        distiller.train_on_batch(x, y)
    folder = tmp_path_factory.mktemp("saved")
    distiller.save(folder / "distiller.keras")
    distiller.student.save(folder / "student.keras")
    np.save(folder / "x.npy", x)
    return distiller, x, folder


# One process answers what would take several: starting Keras takes seconds.
WITHOUT_THEN_WITH = """
import json, sys, keras, numpy as np
folder = sys.argv[1]
x = np.load(f"{folder}/x.npy")
def value(tensor):
    return keras.ops.convert_to_numpy(tensor).tolist()
found = {}

sys.modules["dskd_keras"] = None  # as if it were not installed
found["student"] = value(keras.models.load_model(f"{folder}/student.keras")(x))
del sys.modules["dskd_keras"]

before = {*sys.modules}
import dskd_keras
found["before"], found["loaded"] = [*before], [*({*sys.modules} - before)]

loaded = keras.models.load_model(f"{folder}/distiller.keras")
found["logits"], found["teacher"] = value(loaded(x)), value(loaded.teacher(x)["logits"])
found["optimizer"] = type(loaded.optimizer).__module__
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(saved):
    return fresh(WITHOUT_THEN_WITH, saved[2])


def test_the_import_loads_the_core_alone(answers):
    ours = {name for name in answers["loaded"] if name.partition(".")[0] == "dskd_keras"}
    assert ours == {"dskd_keras", *(f"dskd_keras.{name}" for name in GROUND + CORE)}
    before, loaded = (
        {name.partition(".")[0] for name in answers[key]} for key in ("before", "loaded")
    )
    assert loaded - {"dskd_keras"} <= before | set(sys.stdlib_module_names)


def test_a_saved_student_loads_without_dskd_keras(saved, answers):
    distiller, x, folder = saved
    config = zipfile.ZipFile(folder / "student.keras").read("config.json").decode()
    assert "dskd" not in config and "head_" not in config
    expected = keras.ops.convert_to_numpy(distiller(x))
    np.testing.assert_allclose(answers["student"], expected, rtol=1e-5, atol=1e-6)


def test_a_saved_distiller_loads_after_the_import_alone(saved, answers):
    distiller, x, _ = saved
    expected = keras.ops.convert_to_numpy(distiller(x))
    np.testing.assert_allclose(answers["logits"], expected, rtol=1e-5, atol=1e-6)
    expected = keras.ops.convert_to_numpy(distiller.teacher(x)["logits"])
    np.testing.assert_allclose(answers["teacher"], expected, rtol=1e-5, atol=1e-6)
    assert answers["optimizer"] == "dskd_keras.optimizers"


def test_commands_can_put_keras_off_and_every_name_is_reached(saved):
    found = fresh(
        "import json, sys, dskd_keras\n"
        "early = [name for name in ('keras', 'numpy') if name in sys.modules]\n"
        "hidden = sorted({*dskd_keras.__all__} - {*dir(dskd_keras)})\n"
        "missing = [n for n in dskd_keras.__all__ if not hasattr(dskd_keras, n)]\n"
        "exec('from dskd_keras import *')\n"
        # Imported before Keras, it finds the classes of what was saved, too.
        "import keras\n"
        "loaded = keras.models.load_model(f'{sys.argv[1]}/distiller.keras')\n"
        "print(json.dumps([early, hidden, missing, Distiller.__name__, type(loaded).__name__]))",
        saved[2],
        DSKD_KERAS_DEFER="1",
    )
    assert found == [[], [], [], "Distiller", "Distiller"]
    with pytest.raises(AttributeError, match="'dskd_keras' has no attribute 'destiller'"):
        _ = dskd_keras.destiller


TYPED = [
    *(f"dskd_keras.{name}" for name in [*GROUND, *CORE, "answering", "drawing", "export"]),
    *(f"dskd_keras.{name}" for name in ("csv_cells", "files", "yaml_files")),
    *(f"dskd_keras.{name}" for name in ("callbacks", "data", "models", "report", "tuning")),
]


def public_names(module):
    """What a module shows: `__all__`, or what it defines under a name without an underscore."""
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


def functions(name, value):
    """The public functions of a name: itself, or those of a class that this project defines."""
    if inspect.isfunction(value):
        yield name, value
    for cls in value.__mro__ if inspect.isclass(value) else ():
        if not cls.__module__.startswith("dskd_keras"):
            continue
        for member, given in vars(cls).items():
            given = given.fget if isinstance(given, property) else given
            given = getattr(given, "__func__", given)  # of a class method
            if inspect.isfunction(given) and (
                not member.startswith("_") or member in ("__init__", "__call__")
            ):
                yield f"{cls.__name__}.{member}", given


def without_types(name, function):
    signature = inspect.signature(function)
    for number, parameter in enumerate(signature.parameters.values()):
        itself = number == 0 and parameter.name in ("self", "cls")
        if not itself and parameter.annotation is inspect.Parameter.empty:
            yield f"{name}: {parameter.name}"
    if signature.return_annotation is inspect.Signature.empty and not name.endswith(".__init__"):
        yield f"{name}: what it returns"


@pytest.mark.once
@pytest.mark.parametrize("name", TYPED)
def test_public_names_are_typed(name):
    public = public_names(importlib.import_module(name))
    assert public
    assert not [
        missing
        for public_name, value in public.items()
        for function_name, function in functions(public_name, value)
        for missing in without_types(function_name, function)
    ]
