"""Exports a student to ONNX, SavedModel or LiteRT, and compares the file's logits with the model's.

The conversion is Keras's own, `keras.Model.export`. What it wrote is then run by another runtime:
converters have written files that don't load, and files that give other logits.
"""

import contextlib
import glob
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dskd_keras.errors import ExportError, InputError, missing_package, unknown_name
from dskd_keras.keras_internals import flat_layers

# How the name of an exported student ends. A SavedModel is a folder.
SUFFIXES = {"onnx": ".onnx", "saved_model": "_saved_model", "litert": ".tflite"}
FORMATS = tuple(SUFFIXES)

# Largest difference of a logit, in standard deviations of the logits. Six models, one of each
# family and more, came out within 2.5e-6 in every format on every backend (on CPUs); an epsilon of
# all batch normalisations that is wrong by 1e-3 gives 8e-4 or more.
TOLERANCE = 1e-4

# Of the folders that are written to before a file is in its place.
_ASIDE = ".exporting"

# What each format imports on each backend, by the names to import; pip knows them with hyphens.
# What is not here can't be had:
# - ONNX from JAX: jax2onnx 0.17.1 writes max pooling over four dimensions, which ONNX Runtime
#   doesn't run, and comes with 34 packages.
# - SavedModel from PyTorch: Keras takes torch_xla, whose last release (2.9) wants torch 2.9.
# - LiteRT from JAX: Keras doesn't.
# - LiteRT from PyTorch: litert-torch comes with transformers and 37 other packages (535 MB),
#   and fixes the batch to 1.
_PACKAGES = {
    ("onnx", "tensorflow"): ("onnx", "onnxruntime", "tf2onnx"),
    ("onnx", "torch"): ("onnx", "onnxruntime"),
    ("saved_model", "tensorflow"): (),
    ("saved_model", "jax"): ("tensorflow",),
    ("litert", "tensorflow"): ("ai_edge_litert",),
}


def check_available(format: str) -> None:
    """Raises unless this process can export to a format and check what it wrote.

    It imports nothing, so it takes milliseconds, and training can wait for its answer.

    Args:
        format: One of `FORMATS`.

    Raises:
        InputError: The format is unknown, the current Keras backend can't export to it, or packages
            are missing; the message says which backend or packages to take.
    """
    if format not in FORMATS:
        raise unknown_name("export", format, FORMATS)
    backend = keras.backend.backend()
    packages = _PACKAGES.get((format, backend))
    if packages is None:
        able = " or ".join(able for known, able in _PACKAGES if known == format)
        raise InputError(
            f"export: {format!r} can't be written with the {backend} backend. Take KERAS_BACKEND="
            f"{able}; a student.keras that {backend} trained loads there too."
        )
    for name in packages:
        if not _installed(name):
            extra = "tensorflow" if name == "tensorflow" else "export"
            raise missing_package("export", name.replace("_", "-"), extra)
    channels_first = keras.config.image_data_format() == "channels_first"
    if channels_first and (format, backend) == ("saved_model", "tensorflow"):
        # TensorFlow's convolutions lack it on CPUs, where the file is checked.
        raise InputError(
            "export: 'saved_model' with the tensorflow backend needs the image data format "
            "channels_last; onnx and litert take channels_first too."
        )


def export(
    model: keras.Model, format: str, path: str | os.PathLike[str], images: np.ndarray
) -> tuple[Path, float]:
    """Exports a model, and keeps the file only if another runtime gets the same logits from it.

    The file takes batches of any size. ONNX Runtime, TensorFlow's SavedModel loader or the LiteRT
    interpreter runs it on the CPU on `images`, all of them as one batch. What the converters print
    is dropped. A file or folder that is already there is replaced after the check has passed, and
    stays otherwise.

    Args:
        model: A functional or Sequential model from one batch of images to logits `[B, C]`, in
            float32.
        format: One of `FORMATS`.
        path: Where to write; a file for "onnx" and "litert", a folder for "saved_model".
            `SUFFIXES[format]` is the usual ending.
        images: float32 `[N, *model.input_shape[1:]]`, as the model takes them, N at least 2. They
            should be images like those that it was trained on: noise may leave parts of a model
            unused.

    Returns:
        The path, and the measured difference: the largest absolute difference of a logit, divided
        by the standard deviation of all `N · C` logits of the Keras model.

    Raises:
        InputError: As `check_available`, or the model or `images` can't be used.
        ExportError: The conversion failed, the other runtime can't run the file, or the difference
            is above `TOLERANCE`.

    Example:

    ```python
    path, difference = export(student, "onnx", "student.onnx", x_test[:64])
    ```
    """
    check_available(format)
    images = np.asarray(images)
    _check_arguments(model, images)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_ASIDE, dir=path.parent))
    try:
        # Before the conversion: Keras exports only models that have been called.
        expected = _keras_logits(model, images)
        # Keras refuses a LiteRT file of another suffix, whatever the user calls it.
        written = aside / f"model{SUFFIXES[format]}"
        with _failure(f"{model.name} can't be converted to {format!r}"):
            _convert(model, format, written)
        with _failure(
            f"{model.name} was converted to {format!r}, but what came out can't be run on "
            f"{len(images)} images"
        ):
            logits = _RUNTIMES[format](written, images)
        difference = _difference(logits, expected)
        if not difference <= TOLERANCE:  # NaN is none either
            raise ExportError(
                f"export: {model.name} gives other logits in {format!r} than in Keras: they differ "
                f"by {difference:.2g} standard deviations, where {TOLERANCE:.0e} is allowed."
            )
        _replace(written, path, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path, difference


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes what killed processes left beside a path that they were exporting to.

    Args:
        path: What `export` got. No other process may be exporting to it.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{_ASIDE}"):
        # Between its dots stand letters and digits: the rest belongs to a longer name.
        if "." not in leftover.name[len(path.name) + 2 : -len(_ASIDE)]:
            shutil.rmtree(leftover, ignore_errors=True)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _check_arguments(model: keras.Model, images: np.ndarray) -> None:
    """Raises `InputError` for a model or images that can't be compared."""
    if len(model.inputs) != 1 or len(model.outputs) != 1 or len(model.outputs[0].shape) != 2:
        raise InputError(
            f"export: {model.name} should have one input and give one output, logits [B, C]."
        )
    policies = {layer.compute_dtype for layer in flat_layers(model)}
    if policies != {"float32"}:
        raise InputError(
            f"export: {model.name} computes in {' and '.join(sorted(policies - {'float32'}))}; "
            "only models in float32 can be exported."
        )
    expected = tuple(model.inputs[0].shape[1:])
    if images.dtype != "float32" or images.shape[1:] != expected or len(images) < 2:
        raise InputError(
            f"images: {images.dtype} of shape {images.shape} are not two or more float32 images "
            f"of shape {expected}, which {model.name} takes."
        )


def _convert(model: keras.Model, format: str, path: Path) -> None:
    """Writes the model to `path` by Keras's own export."""
    arguments: dict[str, Any] = {}
    if (format, keras.backend.backend()) == ("saved_model", "jax"):
        # Otherwise only machines with the kind of processor that trained the student run it.
        arguments["jax2tf_kwargs"] = {
            "native_serialization": True,
            "native_serialization_platforms": ("cpu", "cuda"),
        }
    elif format != "saved_model" and keras.backend.backend() == "tensorflow":
        model = _convertible(model)
    kind = "tf_saved_model" if format == "saved_model" else format
    model.export(path, format=kind, verbose=False, **arguments)


def _convertible(model: keras.Model) -> keras.Model:
    """Returns the model, or a copy of it, that TensorFlow traces into what converters understand.

    Keras compiles grouped convolutions by XLA, since TensorFlow's operation lacks them on CPUs, and
    tf2onnx leaves a compiled function in the file as it is. In a graph that is only converted
    TensorFlow's operation will do. And it makes additional inputs of the tensors that a
    `Normalization` holds, but constants of arrays.
    """
    import tensorflow as tf

    def convolution_op(layer: Any, inputs: Any, kernel: Any) -> Any:
        return tf.nn.convolution(
            inputs,
            kernel,
            strides=list(layer.strides),
            padding=layer.padding.upper(),
            dilations=list(layer.dilation_rate),
            data_format="NCHW" if layer.data_format == "channels_first" else "NHWC",
        )

    def is_grouped(layer: Any) -> bool:
        return isinstance(layer, keras.layers.Conv2D) and layer.groups > 1

    def is_normalization(layer: Any) -> bool:
        return isinstance(layer, keras.layers.Normalization)

    if not any(is_grouped(layer) or is_normalization(layer) for layer in flat_layers(model)):
        return model
    copy = keras.models.clone_model(model, recursive=True)
    copy.set_weights(model.get_weights())
    copy(copy.inputs)  # Keras exports only models that have been called
    for layer in flat_layers(copy):
        if is_grouped(layer):
            # The hook that Keras documents for convolutions, here of one object.
            layer.convolution_op = convolution_op.__get__(layer)
        elif is_normalization(layer):
            layer.finalize_state()
            layer.mean = keras.ops.convert_to_numpy(layer.mean)
            layer.variance = keras.ops.convert_to_numpy(layer.variance)
    return copy


def _onnx_logits(path: Path, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # only what is fatal
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    return logits


def _saved_model_logits(path: Path, images: np.ndarray) -> np.ndarray:
    import tensorflow as tf

    with tf.device("CPU:0"):
        loaded = tf.saved_model.load(str(path))  # its variables live as long as it does
        logits = loaded.serve(tf.constant(images))
    return np.asarray(logits)


def _litert_logits(path: Path, images: np.ndarray) -> np.ndarray:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    (inputs,), (outputs,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(inputs["index"], images.shape, strict=True)
    interpreter.allocate_tensors()
    interpreter.set_tensor(inputs["index"], images)
    interpreter.invoke()
    return interpreter.get_tensor(outputs["index"]).copy()


# By format: from a path and images, float32 `[N, …]`, to logits `[N, C]`.
_RUNTIMES = {"onnx": _onnx_logits, "saved_model": _saved_model_logits, "litert": _litert_logits}


def _keras_logits(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Returns the model's logits `[N, C]` in inference mode, computed in full float32."""
    channels_first = keras.config.image_data_format() == "channels_first"
    with _full_float32():
        if channels_first and keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            # Uncompiled, TensorFlow's convolutions lack this data format on CPUs.
            compiled = tf.function(lambda x: model(x, training=False), jit_compile=True)
            return compiled(tf.constant(images)).numpy()
        return model.predict(images, batch_size=len(images), verbose=0)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Keeps GPUs from TF32, which keeps 10 bits of a number: its errors would be the export's."""
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "tensorflow":
            from tensorflow.config import experimental

            before = experimental.tensor_float_32_execution_enabled()
            stack.callback(experimental.enable_tensor_float_32_execution, before)
            experimental.enable_tensor_float_32_execution(False)
        elif keras.backend.backend() == "jax":
            import jax

            stack.enter_context(jax.default_matmul_precision("highest"))
        else:
            from torch import backends

            for library in (backends.cudnn, backends.cuda.matmul):
                stack.callback(setattr, library, "allow_tf32", library.allow_tf32)
                library.allow_tf32 = False
        yield


def _difference(logits: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference in standard deviations of what is expected."""
    if logits.shape != expected.shape:
        return float("inf")
    logits, expected = logits.astype("float64"), expected.astype("float64")
    return float(np.abs(logits - expected).max() / max(expected.std(), np.finfo("float32").tiny))


def _replace(written: Path, path: Path, aside: Path) -> None:
    """Puts what was written in its place, whole."""
    for file in [written, *written.rglob("*")]:
        if file.is_file():
            # On the disk before the old one goes, should the machine lose power.
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
    old = aside / "old"
    if path.is_dir():
        # A folder takes the place of an empty one only.
        os.replace(path, old)
    try:
        os.replace(written, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what is printed, warned of and logged, by Python and by the libraries under it."""
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(tempfile.TemporaryFile("w"))
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            with contextlib.suppress(ValueError, AttributeError):  # closed, or there is none
                stream.flush()
            try:
                kept = os.dup(descriptor)
            except OSError:  # a process without a terminal may have closed it
                continue
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, descriptor)
            os.dup2(sink.fileno(), descriptor)
        # In a notebook these two are not the descriptors. The sink is flushed before they go back.
        stack.callback(sink.flush)
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        yield


@contextlib.contextmanager
def _failure(message: str) -> Iterator[None]:
    """Says in one line what fails in a converter or another runtime, and drops what they print."""
    try:
        with _quiet():
            yield
    except Exception as error:  # they raise all kinds
        text = " ".join(str(error).split()) or type(error).__name__
        cut = text if len(text) <= 400 else f"{text[:400]}…"
        raise ExportError(f"export: {message}: {cut}") from error
