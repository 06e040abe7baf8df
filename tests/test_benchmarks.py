"""What the benchmarks compare is what they say; their timings are no tests."""

import math

import numpy as np
import pytest

from benchmarks import step, task_data, timing
from dskd_keras import models


def test_ratios_are_taken_within_a_round():
    # The machine is twice as slow in the second round, and slower still in the third.
    seconds = {"a": [1.0, 2.0, 30.0], "b": [2.0, 4.0, 10.0], "c": [2.0, 4.0, 50.0]}
    ratio = timing.ratio(seconds, ["a"], ["b", "c"])
    assert ratio["median"] == pytest.approx(0.25)
    assert ratio["quartiles"] == pytest.approx([0.25, 0.375])
    assert timing.ratio(seconds, ["a"], ["d"]) is None
    assert timing.milliseconds(seconds["a"]) == 2000


def test_contenders_are_timed_in_turn():
    calls = []
    contenders = {name: lambda steps, name=name: calls.append(name) or 0.5 for name in "ab"}
    assert timing.in_turn(contenders, 3, 2, lambda line: None) == {"a": [0.5] * 3, "b": [0.5] * 3}
    assert calls == list("ab" + 3 * "ab")


def test_every_ratio_is_of_things_that_are_timed():
    for _, above, below in step._RATIOS:
        assert {*above, *below} <= step._CONTENDERS.keys()


@pytest.mark.once
@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet8x4"])
def test_the_pytorch_loop_has_the_models_of_the_zoo(name):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_loop

    own = torch_loop.ResNet(name, 100)
    model = models.create(name, 100, (32, 32, 3))
    assert sum(p.numel() for p in own.parameters()) == sum(
        math.prod(weight.shape) for weight in model.trainable_weights
    )
    for norm in own.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean)
            torch.nn.init.uniform_(norm.weight, 0.2, 0.4)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits, features = own.eval()(x)
        folded, _ = torch_loop.folded(own, "float32")(x)
    sizes = [tuple(feature.shape[1:]) for feature in features]
    stages = [tuple(model.get_layer(f"stage{stage}").output.shape[1:]) for stage in (1, 2, 3)]
    assert sizes == [(channels, *size) for *size, channels in stages]
    torch.testing.assert_close(folded, logits, atol=1e-4, rtol=1e-4)
    assert not torch_loop.can_build("vgg8") and not torch_loop.can_build("resnet18")


@pytest.mark.once
def test_brackets_are_labelled_by_what_is_open_and_training_labels_alone_are_wrong():
    clean, noisy = (task_data.brackets(300, 50, wrong=share) for share in (0, 0.2))
    for tokens, labels in zip(*noisy.test, strict=True):
        stack = [0]
        for token, label in zip(tokens, labels, strict=True):
            if token == 0:
                assert label == task_data.IGNORED
                continue
            if token < 5:
                stack.append(token)
            elif token == 5:
                stack.pop()
            assert label == stack[-1]
    np.testing.assert_array_equal(noisy.validation.y, clean.validation.y)
    np.testing.assert_array_equal(noisy.train.x, clean.train.x)
    is_wrong = noisy.train.y != clean.train.y
    assert is_wrong[noisy.train.x > 0].mean() == pytest.approx(0.2, abs=0.02)
    assert not is_wrong[noisy.train.x == 0].any()
