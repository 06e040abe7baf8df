"""Small data sets for `benchmarks.tasks`: generated, or made of scikit-learn's digits.

Every function returns `Splits`. The training labels are partly wrong, those of validation and test
are right. Digits of the training pictures occur in no other split.
"""

from typing import NamedTuple

import numpy as np

IGNORED = 255  # the label of what counts nowhere, as in Pascal VOC

OPENING, _CLOSING, _FILLERS = 4, 5, 8

# The language of the text task: words by what they mean, numbered from 1. 0 is padding.
TOPICS, _TOPIC_WORDS = 4, 3
_KINDS = {"topic": TOPICS * _TOPIC_WORDS, "good": 6, "bad": 6, "not": 2, "filler": 12}
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


def text(train=3200, held_out=2000, length=16, wrong=0.1, seed=0):
    """Returns sentences of an invented language, classified by topic and opinion.

    The topic is that of most topic words. The opinion is the sum of the good and the bad words; a
    "not" turns over the next of them, however far it stands from it. Both are clear: the topic
    leads by two words, and two words more are good, or bad.

    Args:
        train: Number of training sentences.
        held_out: Number of sentences for validation, and for testing.
        length: Longest sentence, in words; the shortest has half of that.
        wrong: Share of training labels that are replaced by another class.
        seed: Of all random numbers.

    Returns:
        `Splits` of int32 `[N, length]` with zeros as padding, and of classes int32 `[N]`, 8 in all.
    """
    rng = np.random.default_rng(seed)
    count = train + 2 * held_out
    x, y, chances = np.zeros((count, length), "int32"), np.zeros(count, "int32"), _chances()
    for row in range(count):
        opinion = margin = 0
        while abs(opinion) < 2 or margin < 2:
            size, favourite = rng.integers(length // 2, length + 1), rng.integers(TOPICS)
            words = rng.choice(WORDS, size, p=chances[favourite]).tolist()
            topic, margin, opinion = sentence_meaning(words)
        x[row, : len(words)] = words
        y[row] = 2 * topic + (opinion > 0)
    return _splits(x, _with_wrong_classes(rng, y, 2 * TOPICS, train, wrong), train, held_out)


def _chances():
    """Returns the probability of every word in sentences that favour a topic, `[topics, WORDS]`."""
    share = {"padding": 0, "topic": 0.15, "good": 0.15, "bad": 0.15, "not": 0.15, "filler": 0.3}
    chances = np.array([share[kind] / max(1, _KINDS.get(kind, 0)) for kind in _KIND_OF])
    chances = np.tile(chances, (TOPICS, 1))
    for topic, row in enumerate(chances):
        first = _FIRST["topic"] + topic * _TOPIC_WORDS
        row[first : first + _TOPIC_WORDS] += 0.1 / _TOPIC_WORDS
    return chances


def sentence_meaning(words):
    """Returns the topic, by how many words it leads, and the opinion of a sentence (0: none)."""
    topics, opinion, sign = [0] * TOPICS, 0, 1
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


def brackets(train=2048, held_out=1000, length=24, wrong=0.15, seed=0):
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
                stack.append(int(rng.integers(1, OPENING + 1)))
                token = stack[-1]
            elif draw < 0.65 and stack:
                stack.pop()
                token = _CLOSING
            else:
                token = _CLOSING + rng.integers(1, _FILLERS + 1)
            x[row, position] = token
            y[row, position] = stack[-1] if stack else 0
    return _splits(x, _with_wrong_classes(rng, y, 1 + OPENING, train, wrong), train, held_out)


TOKENS = 1 + _CLOSING + _FILLERS


def segmentation(train=800, held_out=400, size=20, wrong=0.1, seed=0):
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
        for row, place in _quarters(rng, count, size):
            picture, digit = _one(rng, digits)
            x[row][place] = picture
            if rng.random() < share:
                digit = (digit + rng.integers(1, 10)) % 10
            y[row][place][picture >= 0.25] = 1 + digit
        inked = y > 0
        padded = np.pad(inked, [(0, 0), (1, 1), (1, 1)])
        around = np.zeros_like(inked)
        for down, right in np.ndindex(3, 3):
            around |= padded[:, down : down + size, right : right + size]
        y[around & ~inked] = IGNORED
        return Examples(_noisy(rng, x, 0.25), y)

    return _drawn(rng, draw, train, held_out, wrong)


def multi_label(train=1600, held_out=1000, size=20, wrong=0.05, seed=0):
    """Returns noisy pictures of digits, labelled by which digits occur.

    Args:
        train: Number of training pictures.
        held_out: Number of pictures for validation, and for testing.
        size: Height and width; each quarter of the picture has a digit or none, equally often.
        wrong: Share of the training labels that are turned over.
        seed: Of all random numbers.

    Returns:
        `Splits` of float32 `[N, size, size, 1]` and of labels float32 `[N, 10]`, 0 or 1.
    """
    rng = np.random.default_rng(seed)

    def draw(digits, count, share):
        x = np.zeros((count, size, size), "float32")
        y = np.zeros((count, 10), "float32")
        for row, place in _quarters(rng, count, size):
            if rng.random() < 0.5:
                x[row][place], digit = _one(rng, digits)
                y[row, digit] = 1
        turned = rng.random(y.shape) < share
        return Examples(_noisy(rng, x, 0.15), np.where(turned, 1 - y, y))

    return _drawn(rng, draw, train, held_out, wrong)


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


def _drawn(rng, draw, train, held_out, wrong):
    """Returns pictures of three disjoint parts of scikit-learn's digits, as `draw` makes them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = rng.permutation(len(digits.target))
    parts = np.split(order, [len(order) // 2, 3 * len(order) // 4])
    counts, shares = (train, held_out, held_out), (wrong, 0, 0)
    return Splits(
        *(
            draw((digits.images[part].astype("float32") / 16, digits.target[part]), count, share)
            for part, count, share in zip(parts, counts, shares, strict=True)
        )
    )


def _quarters(rng, count, size):
    """Yields, for each quarter of each picture, its number and somewhere a digit has room in it."""
    half = size // 2
    for row, top, left in np.ndindex(count, 2, 2):
        down, right = np.array([top, left]) * half + rng.integers(0, half - 8 + 1, 2)
        yield row, (slice(down, down + 8), slice(right, right + 8))


def _one(rng, digits):
    pictures, targets = digits
    index = rng.integers(len(targets))
    return pictures[index], int(targets[index])


def _noisy(rng, pictures, deviation):
    return (pictures + rng.normal(0, deviation, pictures.shape)).astype("float32")[..., None]
