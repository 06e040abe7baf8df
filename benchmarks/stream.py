"""How fast images are read from their files, and how much memory that takes.

    python -m benchmarks.stream

Photographs are made at random: JPEGs of 500×375 pixels, which links repeat, since what is in them
does not matter to who decodes them. They are cut, resized and mirrored as for ImageNet. Timed are
batches of a stream, of the same images in memory, and of PyTorch's DataLoader, which decodes the
same files with Pillow and does the same to them.

Then an epoch of a set that is several times as large as what a process may allocate is read.
"""

import dataclasses
import itertools
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from jsonargparse.typing import PositiveInt
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import timing

_WIDTH, _HEIGHT = 500, 375
_CLASSES = 10
_DIFFERENT = 100
_MEBIBYTE = 2**20


def main(
    images: PositiveInt = 2000,
    image_size: PositiveInt = 224,
    batch_size: PositiveInt = 64,
    workers: PositiveInt = 2,
    rounds: PositiveInt = 3,
    steps: PositiveInt = 8,
    limit_mib: int = 1024,
    times_the_limit: PositiveInt = 5,
    backend: timing.Backend | None = "torch",
    json_file: str | None = None,
):
    """Times the reading of images, and reads a set that is larger than a limit of memory.

    Args:
        images: In the folder that is timed.
        image_size: Side in pixels to which they are brought.
        batch_size: Images a batch.
        workers: Processes that decode, ours and the DataLoader's.
        rounds: How often each is timed.
        steps: Batches each time.
        limit_mib: What each process may allocate when the larger set is read; 0 leaves it out.
        times_the_limit: The size of that set, decoded, in limits.
        backend: tensorflow, jax or torch. Default: KERAS_BACKEND.
        json_file: Where to write the results too.
    """
    timing.set_backend(backend)
    console = Console(width=100)
    result = {"machine": timing.machine(), "image_size": image_size, "workers": workers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "timed")
        size = make_folder(path, images)
        console.print(f"{images:,} JPEGs of {_WIDTH}×{_HEIGHT} pixels, {size / 1024:.0f} KiB each")
        result["speed"] = _speed(path, image_size, batch_size, workers, rounds, steps, console)
        if limit_mib:
            decoded = image_size**2 * 3
            count = times_the_limit * limit_mib * _MEBIBYTE // decoded
            make_folder(Path(folder, "large"), count)
            result["memory"] = {}
            for stream in (True, False):
                said = _under_limit(Path(folder, "large"), image_size, workers, limit_mib, stream)
                what = "stream" if stream else "in memory"
                result["memory"][what] = said
                console.print(
                    f"{count:,} images, {count * decoded / _MEBIBYTE:,.0f} MiB decoded, with "
                    f"{limit_mib:,} MiB a process, {what}: {said}"
                )
    console.print(result["machine"])
    timing.write_json(json_file, result)


def make_folder(path, count):
    """Writes a folder of class folders with so many images; returns the mean size of a file."""
    rng = np.random.default_rng(0)
    originals = path.with_name(f".{path.name}")
    originals.mkdir(parents=True)
    sizes = []
    for index in range(min(count, _DIFFERENT)):
        # Coarse noise and fine: about as many bytes as a photograph of that size.
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC), np.int16)
        pixels = pixels + rng.normal(0, 12, pixels.shape)
        file = originals / f"{index}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=85)
        sizes.append(file.stat().st_size)
    for part, number in (("train", count), ("test", _CLASSES)):
        for name in range(_CLASSES):
            (path / part / str(name)).mkdir(parents=True)
        for index in range(number):
            target = path / part / str(index % _CLASSES) / f"{index:07}.jpg"
            os.link(originals / f"{index % len(sizes)}.jpg", target)
    return float(np.mean(sizes))


def _speed(path, image_size, batch_size, workers, rounds, steps, console):
    from dskd_keras import data

    def of(dataset):
        return data.TrainingBatches(
            dataset.x_train, dataset.y_train, batch_size, 0, dataset.mean, dataset.std,
            "resized_crop_flip",
        )  # fmt: skip

    settings = {"image_size": image_size, "stream": True}
    stream = data.load(path, stream_workers=workers, **settings)
    here = of(data.load(path, stream_workers=0, **settings))
    few = slice(8 * batch_size)
    memory = of(
        dataclasses.replace(stream, x_train=stream.x_train[few], y_train=stream.y_train[few])
    )
    contenders = {
        f"stream, {workers} processes": _read(of(stream)),
        "stream, threads": _read(here),
        "in memory": _read(memory),
        f"PyTorch DataLoader, {workers} processes": _loader(
            path, image_size, batch_size, workers, stream.mean, stream.std
        ),
    }
    seconds = timing.in_turn(contenders, rounds, steps, console.print)
    *_, loader = contenders
    table = Table(title=f"batches of {batch_size}", title_justify="left")
    for column in ("images read", "a second", "of the DataLoader's", "quartiles"):
        table.add_column(column, justify="left" if column == "images read" else "right")
    found = {}
    for name, values in seconds.items():
        ratio = timing.ratio(seconds, [loader], [name])
        speed = 1000 * batch_size / timing.milliseconds(values)
        found[name] = {"images_per_second": speed, "over_the_dataloader": ratio}
        low, high = ratio["quartiles"]
        table.add_row(name, f"{speed:,.0f}", f"{ratio['median']:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(table)
    return found


def _read(batches):
    """Returns a function that reads so many batches and returns the seconds of one."""
    place = itertools.count()

    def run(steps):
        batches[next(place)]  # starts the processes
        begin = time.perf_counter()
        for _ in range(steps):
            batches[next(place)]
        seconds = (time.perf_counter() - begin) / steps
        # What it makes ahead is not to run beside the next contender.
        batches.close()
        return seconds

    return run


def _loader(path, image_size, batch_size, workers, mean, std):
    from torch.utils.data import DataLoader

    dataset = _Photographs(sorted((path / "train").glob("*/*.jpg")), image_size, mean, std)
    loader = DataLoader(
        dataset, batch_size, shuffle=True, num_workers=workers, multiprocessing_context="spawn"
    )

    def run(steps):
        batches = iter(loader)
        next(batches)  # starts the processes
        begin = time.perf_counter()
        for _ in range(steps):
            next(batches)
        return (time.perf_counter() - begin) / steps

    return run


class _Photographs:
    """What a researcher would write: one image at a time, by Pillow and NumPy."""

    def __init__(self, files, size, mean, std):
        self.files, self.size = files, size
        self.mean, self.std = np.float32(mean), np.float32(std)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image = Image.open(self.files[index]).convert("RGB")
        image = image.crop(self._window(image)).resize((self.size,) * 2, Image.Resampling.BILINEAR)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image, np.float32) / 255
        return (pixels - self.mean) / self.std, int(self.files[index].parent.name)

    def _window(self, image):
        for _ in range(10):
            area = image.width * image.height * random.uniform(0.08, 1)
            aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if wide <= image.width and tall <= image.height:
                left = random.randint(0, image.width - wide)
                top = random.randint(0, image.height - tall)
                return left, top, left + wide, top + tall
        return 0, 0, image.width, image.height


def _under_limit(path, image_size, workers, limit_mib, stream):
    """Returns what came of an epoch in a process that may allocate so much, and those it starts."""
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.stream_epoch", str(path), str(image_size),
            str(workers), str(limit_mib), str(stream),
        ],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else f"ended with {done.returncode}"


if __name__ == "__main__":
    timing.run_command(main)
