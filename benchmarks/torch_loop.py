"""Distillation as one writes it in plain PyTorch: what the Keras step is compared with.

The CIFAR residual networks (He et al., arXiv 1512.03385, section 4.2) and a loop of a dozen lines:
cross-entropy, temperature-softened divergence, and a mean squared error for each of three stages.
"""

import re
import time

import torch
import torch.nn.functional as F
from torch import nn

_NAME = re.compile(r"resnet(\d+)(x4)?")


def can_build(name):
    """Returns whether there is a PyTorch model of that name here."""
    match = _NAME.fullmatch(name)
    return bool(match) and (int(match.group(1)) - 2) % 6 == 0


class _Block(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = None
        if stride > 1 or inputs != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """The networks that the zoo calls `resnet8` … `resnet110` and `resnet8x4`, `resnet32x4`."""

    def __init__(self, name, classes):
        super().__init__()
        depth, wide = _NAME.fullmatch(name).groups()
        stem, widths = (32, (64, 128, 256)) if wide else (16, (16, 32, 64))
        self.conv = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(stem)
        stages, inputs = [], stem
        for stage, width in enumerate(widths):
            blocks = []
            for block in range((int(depth) - 2) // 6):
                blocks.append(_Block(inputs, width, 2 if stage and not block else 1))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.logits = nn.Linear(inputs, classes)

    def forward(self, x):
        """Returns the logits and the outputs of the stages."""
        features = []
        x = F.relu(self.bn(self.conv(x)))
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return self.logits(x.mean(dim=(2, 3))), features


def folded(model, dtype):
    """Returns a teacher with its batch norms folded by PyTorch's own means, in another dtype."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model.eval()
    model.conv, model.bn = fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()
    for stage in model.stages:
        for block in stage:
            block.conv1 = fuse_conv_bn_eval(block.conv1, block.bn1)
            block.conv2 = fuse_conv_bn_eval(block.conv2, block.bn2)
            block.bn1 = block.bn2 = nn.Identity()
            if block.shortcut is not None:
                block.shortcut = fuse_conv_bn_eval(*block.shortcut)
    return model.to(getattr(torch, dtype))


class Loop:
    """The training loop.

    Args:
        teacher: Name of the teacher.
        student: Name of the student.
        classes: Number of classes.
        x: float32 `[N, 3, H, W]`.
        y: int64 `[N]`.
        batch_size: Images a step.
        dtype: Of a folded teacher; None leaves the teacher as it is, in float32.
    """

    def __init__(self, teacher, student, classes, x, y, batch_size, dtype=None):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher = ResNet(teacher, classes).eval()
        if dtype is not None:
            folded(self.teacher, dtype)
        self.dtype = torch.float32 if dtype is None else getattr(torch, dtype)
        self.teacher.to(self.device)
        self.student = ResNet(student, classes).to(self.device)

        # Where teacher and student differ in channels, 1×1 convolutions bring them together.
        def widths(model):
            return [stage[-1].conv2.out_channels for stage in model.stages]

        pairs = zip(widths(self.student), widths(self.teacher), strict=True)
        self.projections = nn.ModuleList(
            nn.Identity() if own == other else nn.Conv2d(own, other, 1) for own, other in pairs
        ).to(self.device)
        self.optimizer = torch.optim.SGD(
            [*self.student.parameters(), *self.projections.parameters()],
            lr=0.01, momentum=0.9, weight_decay=5e-4,
        )  # fmt: skip
        self.x, self.y = (
            torch.from_numpy(x).split(batch_size),
            torch.from_numpy(y).split(batch_size),
        )

    def __call__(self, steps):
        """Trains for so many steps; returns the seconds of one."""
        self._synchronize()
        start = time.perf_counter()
        for step in range(steps):
            self._step(self.x[step % len(self.x)], self.y[step % len(self.y)])
        self._synchronize()
        return (time.perf_counter() - start) / steps

    def _step(self, x, y, temperature=4.0):
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        with torch.no_grad():
            target, hints = self.teacher(x.to(self.dtype))
        logits, features = self.student(x)
        loss = F.cross_entropy(logits, y)
        loss = loss + temperature**2 * F.kl_div(
            F.log_softmax(logits / temperature, dim=1),
            F.log_softmax(target.float() / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        for projection, feature, hint in zip(self.projections, features, hints, strict=True):
            loss = loss + F.mse_loss(projection(feature), hint.float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
