"""What a distillation step costs, and what it is made of.

    python -m benchmarks.step --pair resnet56_resnet20 --backend tensorflow

Times, in one process and in turn: the student alone, the student with its heads on fixed targets,
the teacher alone, DSKD, KD, `keras.distillation.Distiller` with the same kinds of losses, and a
plain PyTorch loop of the same pair. The images are random, which costs the same.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from benchmarks import timing

# What is timed, by name: a method of `contenders.Pair` and its arguments. "half" is the dtype of
# the command line.
_CONTENDERS = {
    "student alone": ("student_alone", {}),
    "student with heads, fixed targets": ("student_with_heads", {}),
    "teacher": ("frozen_teacher", {}),
    "teacher, folded": ("frozen_teacher", {"dtype": "float32"}),
    "teacher, folded, {half}": ("frozen_teacher", {"dtype": "{half}"}),
    "DSKD, plain teacher": ("dskd", {"dtype": None}),
    "DSKD": ("dskd", {}),
    "DSKD, {half} teacher": ("dskd", {"dtype": "{half}"}),
    "DSKD, deep supervision over": ("dskd_over", {}),
    "KD": ("kd", {}),
    "keras.distillation": ("keras_distillation", {}),
    "keras.distillation, folded": ("keras_distillation", {"dtype": "float32"}),
    "keras.distillation, folded, {half}": ("keras_distillation", {"dtype": "{half}"}),
    "input: augmented batches": ("augmented_batches", {}),
    "PyTorch loop": ("torch_loop", {}),
    "PyTorch loop, folded": ("torch_loop", {"dtype": "float32"}),
    "PyTorch loop, folded, {half}": ("torch_loop", {"dtype": "{half}"}),
}

# What is said of them: a name, what is above the line, what is below it.
_RATIOS = [
    (
        "DSKD / (student with heads on fixed targets + folded teacher)",
        ["DSKD"],
        ["student with heads, fixed targets", "teacher, folded"],
    ),
    ("heads: student with heads / student", ["student with heads, fixed targets"],
     ["student alone"]),
    ("DSKD / when deep supervision is over", ["DSKD"], ["DSKD, deep supervision over"]),
    ("DSKD / input", ["DSKD"], ["input: augmented batches"]),
    ("folded / plain teacher", ["teacher, folded"], ["teacher"]),
    ("folded {half} / plain teacher", ["teacher, folded, {half}"], ["teacher"]),
    ("DSKD: folded / plain teacher", ["DSKD"], ["DSKD, plain teacher"]),
    ("DSKD: {half} / float32 teacher", ["DSKD, {half} teacher"], ["DSKD"]),
    ("keras.distillation / DSKD", ["keras.distillation"], ["DSKD"]),
    ("PyTorch loop / DSKD", ["PyTorch loop"], ["DSKD"]),
    ("with our folded teacher: keras.distillation / DSKD", ["keras.distillation, folded"],
     ["DSKD"]),
    ("with a folded teacher: PyTorch loop / DSKD", ["PyTorch loop, folded"], ["DSKD"]),
    ("with our folded {half} teacher: keras.distillation / DSKD",
     ["keras.distillation, folded, {half}"], ["DSKD, {half} teacher"]),
    ("with a folded {half} teacher: PyTorch loop / DSKD", ["PyTorch loop, folded, {half}"],
     ["DSKD, {half} teacher"]),
]  # fmt: skip


def main(
    pair: str = "resnet56_resnet20",
    backend: timing.Backend | None = None,
    data_format: Literal["channels_last", "channels_first"] | None = None,
    batch_size: PositiveInt = 64,
    half: Literal["bfloat16", "float16"] = "bfloat16",
    rounds: PositiveInt = 7,
    steps: PositiveInt = 4,
    memory: bool = True,
    peers: bool = True,
    only: str | None = None,
    json_file: str | None = None,
):
    """Times the parts of a distillation step, and the peers.

    Args:
        pair: A file of configs/.
        backend: tensorflow, jax or torch. Default: KERAS_BACKEND.
        data_format: channels_last or channels_first. Default: Keras's setting.
        batch_size: Images a step.
        half: The lower precision of the teacher: bfloat16 or float16.
        rounds: How often each is timed.
        steps: Steps each time.
        memory: Also measure the peak memory of each, alone in a process of its own.
        peers: Also time keras.distillation and PyTorch.
        only: What to time, by the names in the table, with "; " between them. Default: all.
        json_file: Where to write the results too.
    """
    timing.set_backend(backend)
    # Keras reads its backend when it is imported.
    import keras

    from benchmarks.contenders import Pair
    from dskd_keras.errors import unknown_name
    from dskd_keras.experiment.command_line import parse
    from dskd_keras.experiment.config import ExperimentConfig

    if data_format is not None:
        keras.config.set_image_data_format(data_format)
    console = Console(width=120)
    arguments = ["--pair", pair, "--batch_size", str(batch_size)]
    config = parse(ExperimentConfig, arguments, "benchmarks.step")
    built = Pair(config)
    known = {name.format(half=half): how for name, how in _CONTENDERS.items()}
    wanted = known if only is None else [name.strip() for name in only.split(";")]
    contenders = {}
    for name in wanted:
        if name not in known:
            raise unknown_name("only", name, known)
        method, settings = known[name]
        if only is None and not _fits(name, built, peers):
            continue
        settings = {key: value and value.format(half=half) for key, value in settings.items()}
        contenders[name] = getattr(built, method)(**settings)
    # Keras imports TensorFlow on all backends once something is deserialised; that is over by now.
    before = timing.memory("VmRSS")
    seconds = timing.in_turn(contenders, rounds, steps, lambda line: print(line, flush=True))
    result = {
        "pair": pair,
        "backend": keras.backend.backend(),
        "data_format": keras.config.image_data_format(),
        "device": timing.device(),
        "batch_size": batch_size,
        "rounds": rounds,
        "steps": steps,
        **timing.machine(),
        "contenders": {
            name: {
                "milliseconds": timing.milliseconds(values),
                "images_per_second": 1000 * batch_size / timing.milliseconds(values),
                "all_milliseconds": [1000 * value for value in values],
            }
            for name, values in seconds.items()
        },
        "ratios": {},
    }
    for name, above, below in _RATIOS:
        above, below = ([each.format(half=half) for each in names] for names in (above, below))
        value = timing.ratio(seconds, above, below)
        if value is not None:
            result["ratios"][name.format(half=half)] = value
    if memory and len(contenders) == 1:
        (alone,) = result["contenders"].values()
        alone["peak_memory_mib"] = _device_peak() or timing.memory("VmHWM") - before
    elif memory:
        for name in contenders:
            result["contenders"][name]["peak_memory_mib"] = _memory_of(
                name, pair, batch_size, half, data_format
            )
    console.print(_contenders_table(result))
    if result["ratios"]:
        console.print(_ratios_table(result))
    timing.write_json(json_file, result)


def _fits(name, built, peers):
    """Whether a peer can be timed on this pair."""
    if name.startswith("keras.distillation"):
        return peers and built.can_use_keras_distillation()
    if name.startswith("PyTorch"):
        try:
            from benchmarks import torch_loop
        except ModuleNotFoundError:
            return False
        return peers and all(
            torch_loop.can_build(model) for model in (built.config.teacher, built.config.student)
        )
    return True


def _memory_of(name, pair, batch_size, half, data_format):
    """Returns the peak memory of a contender, alone in a process, beyond the libraries': MiB."""
    file = Path(f"{os.environ.get('TMPDIR', '/tmp')}/step-{os.getpid()}.json")
    command = [
        sys.executable, "-m", "benchmarks.step", "--pair", pair, "--batch_size", str(batch_size),
        "--half", half, "--rounds", "1", "--steps", "4", "--only", name,
        "--json_file", str(file),
    ]  # fmt: skip
    if data_format is not None:
        command += ["--data_format", data_format]
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(file.read_text())["contenders"][name]["peak_memory_mib"]
    finally:
        file.unlink(missing_ok=True)


def _device_peak():
    """Returns the accelerator's peak memory in MiB, None where there is none."""
    import keras

    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        peak = sys.modules["torch"].cuda.max_memory_allocated()
        if peak:
            return peak / 2**20
    if keras.backend.backend() == "jax":
        import jax

        stats = jax.devices()[0].memory_stats()
        return stats and stats["peak_bytes_in_use"] / 2**20
    return None


def _contenders_table(result):
    table = Table(title=f"{result['pair']}, batch {result['batch_size']}, {result['backend']}, "
                        f"{result['device']}")  # fmt: skip
    table.add_column("what")
    for column in ("ms a step", "images/s", "peak memory, MiB"):
        table.add_column(column, justify="right")
    for name, values in result["contenders"].items():
        peak = values.get("peak_memory_mib")
        table.add_row(
            name,
            f"{values['milliseconds']:.1f}",
            f"{values['images_per_second']:,.0f}",
            "–" if peak is None else f"{peak:,.0f}",
        )
    return table


def _ratios_table(result):
    table = Table("ratio", title="Medians over the rounds, quartiles in brackets")
    table.add_column("", justify="right")
    for name, value in result["ratios"].items():
        low, high = value["quartiles"]
        table.add_row(name, f"{value['median']:.2f} ({low:.2f}–{high:.2f})")
    return table


if __name__ == "__main__":
    timing.run_command(main)
