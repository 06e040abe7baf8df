"""The job of `benchmarks.job` as RepDistiller does it, in one plain PyTorch script.

python -m benchmarks.job_of_pytorch START FOLDER TEACHER STUDENT EPOCHS

A DataLoader whose workers crop, mirror and normalise image by image, the loop of `torch_loop`, the
whole test set after each epoch, and the best student's weights in a file.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.torch_loop import Loop

_MEAN, _STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_BATCH, _TEST_BATCH, _WORKERS = 64, 256, 2


class Images(Dataset):
    """Images in memory, augmented one by one where they are for training."""

    def __init__(self, x, y, training):
        self.x, self.y, self.training = x, y, training
        self.mean = np.array(_MEAN, "float32")
        self.std = np.array(_STD, "float32")

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        image = self.x[index]
        if self.training:
            padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
            top, left = np.random.randint(0, 9, 2)
            image = padded[top : top + 32, left : left + 32]
            if np.random.rand() < 0.5:
                image = image[:, ::-1]
        image = (image.astype("float32") / 255 - self.mean) / self.std
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), int(self.y[index])


def main(start, folder, teacher, student, epochs):
    """Trains, and prints the seconds of the parts as JSON."""
    seconds = {"start-up": time.time() - float(start)}

    def count(part, since):
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - since

    since = time.perf_counter()
    with np.load(Path(folder, "images.npz")) as arrays:
        train = Images(arrays["x_train"], arrays["y_train"], True)
        test = Images(arrays["x_test"], arrays["y_test"], False)
    options = {"num_workers": _WORKERS, "pin_memory": torch.cuda.is_available()}
    batches = DataLoader(train, _BATCH, shuffle=True, **options)
    test_batches = DataLoader(test, _TEST_BATCH, **options)
    count("data", since)
    since = time.perf_counter()
    few = np.zeros((1, 3, 32, 32), "float32"), np.zeros(1, "int64")
    loop = Loop(teacher, student, 100, *few, _BATCH)
    count("models", since)

    def accuracy(model):
        model.eval()
        right = 0
        with torch.no_grad():
            for x, y in test_batches:
                logits, _ = model(x.to(loop.device))
                right += int((logits.argmax(1).cpu() == y).sum())
        return right / len(test)

    since, best = time.perf_counter(), -1.0
    accuracy(loop.teacher)
    count("evaluation", since)
    for _ in range(int(epochs)):
        since = time.perf_counter()
        loop.student.train()
        for x, y in batches:
            loop._step(x, y)
        loop._synchronize()
        count("steps", since)
        since = time.perf_counter()
        reached = accuracy(loop.student)
        count("evaluation", since)
        since = time.perf_counter()
        if reached > best:
            best = reached
            torch.save(loop.student.state_dict(), Path(folder, f"best-{start}.pth"))
        count("files", since)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
