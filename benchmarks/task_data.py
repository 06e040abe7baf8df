"""Small data sets for `benchmarks.tasks`: generated, or made of scikit-learn's digits.

Every function returns `Splits`. The training labels are partly wrong, those of validation and test
are right. Digits of the training pictures occur in no other split.
"""

from typing import NamedTuple

import numpy as np

IGNORED = 255  # the label of what counts nowhere, as in Pascal VOC

_OPENING, _CLOSING, _FILLERS = 4, 5, 8

# The language of the text task: words by what they mean, numbered from 1. 0 is padding.
_TOPICS, _TOPIC_WORDS = 4, 3
_KINDS = {"topic": _TOPICS * _TOPIC_WORDS, "good": 6, "bad": 6, "not": 2, "filler": 12}
_KIND_OF = ["padding", *(kind for kind, words in _KINDS.items() for _ in range(words))]
_FIRST = {kind: _KIND_OF.index(kind) for kind in _KINDS}
WORDS = len(_KIND_OF)


class Examples(NamedTuple):
    """Inputs and labels of one split, N of each."""

    x: np.ndarray
    y: np.ndarray


class Splits(NamedTuple):
    """What a task is trained and measured on."""

    train: Examples
    validation: Examples
    test: Examples


def text(train=3000, held_out=2000, length=24, wrong=0.15, seed=0):
    """Returns sentences of an invented language, classified by topic and opinion.

    The topic is that of most topic words. The opinion is the sum of the good and the bad words;
    a "not" turns over the next of them, however far it stands from it.

    Args:
        train: Number of training sentences.
        held_out: Number of sentences for validation, and for testing.
        length: Longest sentence, in words; the shortest has 8.
        wrong: Share of training labels that are replaced by another class.
        seed: Of all random numbers.

    Returns:
        `Splits` of int32 `[N, length]` with zeros as padding, and of classes int32 `[N]`, 8 in all.
    """
    rng = np.random.default_rng(seed)
    count = train + 2 * held_out
    x, y = np.zeros((count, length), "int32"), np.zeros(count, "int32")
    for row in range(count):
        opinion, margin = 0, 0
        while not opinion or not margin:
            words = _sentence(rng, rng.integers(8, length + 1))
            topic, margin, opinion = sentence_meaning(words)
        x[row, : len(words)] = words
        y[row] = 2 * topic + (opinion > 0)
    return _splits(x, _with_wrong_classes(rng, y, 2 * _TOPICS, train, wrong), train, held_out)


def _sentence(rng, length):
    favourite = rng.integers(_TOPICS)
    words = []
    for kind in rng.choice([*_KINDS], length, p=[0.25, 0.15, 0.15, 0.15, 0.3]):
        word = rng.integers(_KINDS[kind])
        if kind == "topic" and rng.random() < 0.4:
            word = favourite * _TOPIC_WORDS + word % _TOPIC_WORDS
        words.append(_FIRST[kind] + word)
    return words


def sentence_meaning(words):
    """Returns the topic, by how many words it leads, and the opinion of a sentence (0: none)."""
    topics, opinion, sign = [0] * _TOPICS, 0, 1
    for word in words:
        kind = _KIND_OF[word]
        if kind == "topic":
            topics[(word - _FIRST["topic"]) // _TOPIC_WORDS] += 1
        elif kind == "not":
            sign = -sign
        elif kind in ("good", "bad"):
            opinion, sign = opinion + (sign if kind == "good" else -sign), 1
    second, first = sorted(topics)[-2:]
    return topics.index(first), first - second, opinion


def brackets(train=1500, held_out=1000, length=32, wrong=0.15, seed=0):
    """Returns sequences with brackets of four kinds, each token labelled by what it stands in.

    One token closes whatever is open, so the label needs the whole stack.

    Args:
        train: Number of training sequences.
        held_out: Number of sequences for validation, and for testing.
        length: Longest sequence, in tokens; the shortest has half of that.
        wrong: Share of training labels that are replaced by another class.
        seed: Of all random numbers.

    Returns:
        `Splits` of int32 `[N, length]` with zeros as padding, and of labels int32 `[N, length]`:
        the kind of the innermost open bracket after the token, 0 outside of all, `IGNORED` at
        padded positions.
    """
    rng = np.random.default_rng(seed)
    count = train + 2 * held_out
    x = np.zeros((count, length), "int32")
    y = np.full((count, length), IGNORED, "int32")
    for row in range(count):
        stack = []
        for position in range(rng.integers(length // 2, length + 1)):
            draw = rng.random()
            if draw < 0.35 and len(stack) < 5:
                stack.append(int(rng.integers(1, _OPENING + 1)))
                token = stack[-1]
            elif draw < 0.65 and stack:
                stack.pop()
                token = _CLOSING
            else:
                token = _CLOSING + rng.integers(1, _FILLERS + 1)
            x[row, position] = token
            y[row, position] = stack[-1] if stack else 0
    return _splits(x, _with_wrong_classes(rng, y, 1 + _OPENING, train, wrong), train, held_out)


TOKENS = 1 + _CLOSING + _FILLERS


def segmentation(train=480, held_out=400, size=24, wrong=0.1, seed=0):
    """Returns noisy pictures with digits on them, each pixel labelled by the digit that it is of.

    Args:
        train: Number of training pictures.
        held_out: Number of pictures for validation, and for testing.
        size: Height and width; the picture has four digits, one a quarter.
        wrong: Share of the digits in training pictures whose pixels are labelled as another digit.
        seed: Of all random numbers.

    Returns:
        `Splits` of float32 `[N, size, size, 1]` and of labels int32 `[N, size, size]`: 0 for the
        background, 1 + digit, and `IGNORED` for the pixels around a digit.
    """
    rng = np.random.default_rng(seed)

    def draw(digits, count, share):
        x = np.zeros((count, size, size), "float32")
        y = np.zeros((count, size, size), "int32")
        half = size // 2
        for row, top, left in np.ndindex(count, 2, 2):
            picture, digit = _one(rng, digits)
            down, right = rng.integers(0, half - 8 + 1, 2)
            place = row, slice(top * half + down, top * half + down + 8), slice(
                left * half + right, left * half + right + 8
            )  # fmt: skip
            x[place] = picture
            if rng.random() < share:
                digit = (digit + rng.integers(1, 10)) % 10
            y[place][picture >= 0.25] = 1 + digit
        inked = y > 0
        around = np.zeros_like(inked)
        for down, right in np.ndindex(3, 3):
            padded = np.pad(inked, [(0, 0), (1, 1), (1, 1)])
            around |= padded[:, down : down + size, right : right + size]
        y[around & ~inked] = IGNORED
        x += rng.normal(0, 0.25, x.shape)
        return Examples(x[..., None], y)

    parts = zip(_digits(rng), (train, held_out, held_out), (wrong, 0, 0), strict=True)
    return Splits(*(draw(*part) for part in parts))


def multi_label(train=960, held_out=1000, size=20, wrong=0.05, seed=0):
    """Returns noisy pictures of one to four digits, labelled by which digits occur.

    The digits may overlap.

    Args:
        train: Number of training pictures.
        held_out: Number of pictures for validation, and for testing.
        size: Height and width.
        wrong: Share of the training labels that are turned over.
        seed: Of all random numbers.

    Returns:
        `Splits` of float32 `[N, size, size, 1]` and of labels float32 `[N, 10]`, 0 or 1.
    """
    rng = np.random.default_rng(seed)

    def draw(digits, count, share):
        x = np.zeros((count, size, size), "float32")
        y = np.zeros((count, 10), "float32")
        for row in range(count):
            for _ in range(rng.integers(1, 5)):
                picture, digit = _one(rng, digits)
                down, right = rng.integers(0, size - 8 + 1, 2)
                place = x[row, down : down + 8, right : right + 8]
                np.maximum(place, picture, out=place)
                y[row, digit] = 1
        x += rng.normal(0, 0.2, x.shape)
        turned = rng.random(y.shape) < share
        return Examples(x[..., None], np.where(turned, 1 - y, y))

    parts = zip(_digits(rng), (train, held_out, held_out), (wrong, 0, 0), strict=True)
    return Splits(*(draw(*part) for part in parts))


def table(train=2048, held_out=2000, wrong=0.2, seed=0):
    """Returns scikit-learn's `make_classification`: 8 classes, 3 clusters each, 30 columns.

    Args:
        train: Number of training rows.
        held_out: Number of rows for validation, and for testing.
        wrong: Share of training labels that are replaced by another class.
        seed: Of all random numbers.

    Returns:
        `Splits` of float32 `[N, 30]`, of mean 0 and variance 1, and of classes int32 `[N]`.
    """
    from sklearn.datasets import make_classification

    x, y = make_classification(
        train + 2 * held_out, 30, n_informative=16, n_redundant=6, n_classes=8,
        n_clusters_per_class=3, class_sep=1.5, flip_y=0, random_state=seed,
    )  # fmt: skip
    x = (x - x[:train].mean(0)) / x[:train].std(0)
    y = _with_wrong_classes(np.random.default_rng(seed), y.astype("int32"), 8, train, wrong)
    return _splits(x.astype("float32"), y, train, held_out)


def _splits(x, y, train, held_out):
    ends = [train, train + held_out]
    parts = zip(np.split(x, ends), np.split(y, ends), strict=True)
    return Splits(*(Examples(*part) for part in parts))


def _with_wrong_classes(rng, y, classes, train, share):
    """Replaces a share of the first `train` labels that are classes."""
    other = (y + rng.integers(1, classes, y.shape)) % classes
    replaced = (rng.random(y.shape) < share) & (y != IGNORED)
    replaced[train:] = False
    return np.where(replaced, other, y).astype("int32")


def _digits(rng):
    """Returns three disjoint parts of the digits, `(pictures [N, 8, 8] from 0 to 1, digits)`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = rng.permutation(len(digits.target))
    parts = np.split(order, [len(order) // 2, 3 * len(order) // 4])
    return [(digits.images[part].astype("float32") / 16, digits.target[part]) for part in parts]


def _one(rng, digits):
    pictures, targets = digits
    index = rng.integers(len(targets))
    return pictures[index], int(targets[index])
