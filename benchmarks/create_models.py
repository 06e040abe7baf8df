"""Time and memory of `models.create` for every model, as the table of a Markdown file.

    python benchmarks/create_models.py --write docs/models.md

Every model is created in a process of its own for each backend, so that none profits from what
another one compiled. The time is that of the call, without imports; the memory is by how much the
process grew.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jsonargparse

_BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
_BEGIN, _END = "<!-- create_models -->", "<!-- /create_models -->"
_CLASSES, _SIZE = 100, 32


def _measure(name):
    """Creates one model in this process and prints what that took, as JSON."""
    import keras
    import psutil

    from dskd_keras import models

    keras.Variable(0.0)  # a backend starts with its first tensor
    process = psutil.Process()
    memory = process.memory_info().rss
    start = time.perf_counter()
    model = models.create(name, _CLASSES, (_SIZE, _SIZE, 3))
    seconds = time.perf_counter() - start
    memory = process.memory_info().rss - memory
    stages = [layer.output.shape[1:] for layer in model.layers if layer.name[:-1] == "stage"]
    parameters = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    print(
        json.dumps(
            {"seconds": seconds, "bytes": memory, "stages": stages, "parameters": parameters}
        )
    )


def _measured(name, backend):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return json.loads(done.stdout.splitlines()[-1])


def _table(names):
    heads = [f"{title}, {unit}" for unit in ("s", "MiB") for title in _BACKENDS.values()]
    lines = [
        f"| model | trainable parameters | stages at {_SIZE}×{_SIZE} | {' | '.join(heads)} |",
        f"|---|--:|---|{'--:|' * len(heads)}",
    ]
    for name in names:
        results = [_measured(name, backend) for backend in _BACKENDS]
        stages = ", ".join(f"{h}×{w}×{c}" for h, w, c in results[0]["stages"])
        cells = [f"{result['seconds']:.1f}" for result in results]
        cells += [f"{result['bytes'] / 2**20:.0f}" for result in results]
        parameters = f"{results[0]['parameters']:,}"
        lines.append(f"| `{name}` | {parameters} | {stages} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main(write: Path | None = None, measure: str | None = None):
    """Measures every model on every backend.

    Args:
        write: A Markdown file; what stands between its marks is replaced by the table.
        measure: Measure this model alone, in this process, and print JSON.
    """
    if measure is not None:
        _measure(measure)
        return
    from dskd_keras import models

    place = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    table = "\n".join([*_table(models.names()), "", f"Measured on {place}."])
    if write is not None:
        text = write.read_text(encoding="utf-8")
        before, _, rest = text.partition(_BEGIN)
        _, found, after = rest.partition(_END)
        if not found:
            raise SystemExit(f"error: write: '{write}' lacks the marks {_BEGIN} and {_END}.")
        write.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
