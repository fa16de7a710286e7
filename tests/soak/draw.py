"""A seed -> what one process does: its models, the shapes of their inputs, and how large its budget is. Pure."""

from __future__ import annotations

from random import Random
from typing import Literal, TypeAlias

import msgspec

__all__ = ["PAIRS", "Model", "Run", "Share", "Step", "draw"]

_LONGEST, _MOST_ROWS = 48, 4
_NEW_TOKENS = 8
_TEXTS = ("A man is eating food.", "The girl is carrying a baby.", "x", "It rains, and then it snows. " * 4)


class Model(msgspec.Struct, frozen=True):
    """A model that runs are drawn from.

    Attributes:
        name: of its directory.
        kind: the work that it does.
        vocabulary: token ids are below it.
        weight: how often it is drawn, beside the others.
    """

    name: str
    kind: Literal["encoder", "sentence", "decoder", "image", "toy"]
    vocabulary: int = 1000
    weight: int = 1


class Share(msgspec.Struct, frozen=True):
    """A budget as a place between too small and everything resident.

    Attributes:
        of_smallest: the smallest budget that works, times this ...
        of_weights: ... and the weights, times this ...
        plus_bytes: ... and this.
    """

    of_smallest: float = 1.0
    of_weights: float = 0.0
    plus_bytes: int = 0

    def bytes_of(self, smallest_bytes: int, weight_bytes: int) -> int:
        """In bytes, for models with these figures."""
        return int(smallest_bytes * self.of_smallest + weight_bytes * self.of_weights) + self.plus_bytes


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call, or several at the same time.

    Attributes:
        do: the call.
        model: the number of the model that is called.
        sizes: (rows, length) of each item; a text's tokens are its length.
        seed: of the inputs.
        together: the most items of a pass of `run_many`.
        budget: of `set_budget`.
        calls: that are made at the same time, each in a thread of its own.
    """

    do: Literal["run", "run_many", "embed", "generate", "set_budget", "callers"]
    model: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    together: int = 1
    budget: Share = Share()
    calls: tuple[Step, ...] = ()


class Run(msgspec.Struct, frozen=True):
    """What one process does.

    Attributes:
        seed: that it was drawn from.
        models: names; several share one `pipeload.Budget`.
        budget: at first.
        loaders, threads: see `pipeload.load`.
        fresh: it begins with an empty cache.
        steps: its calls, in order.
    """

    seed: int
    models: tuple[str, ...]
    budget: Share
    loaders: int | None
    threads: int | None
    fresh: bool
    steps: tuple[Step, ...]


Pair: TypeAlias = tuple[str, str]
PAIRS: tuple[Pair, ...] = (
    ("minilm", "smollm2-135m"),
    ("minilm-int8", "llama"),
    ("bert", "gpt2"),
    ("toy-large", "minilm"),
    ("toy", "toy-other"),
)
"""Models that are loaded under one budget."""


def draw(seed: int, models: dict[str, Model]) -> Run:
    """What the process of this seed does, with these models."""
    random = Random(seed)
    pairs = [pair for pair in PAIRS if models.keys() >= set(pair)]
    if pairs and random.random() < 0.2:
        names: tuple[str, ...] = random.choice(pairs)
    else:
        names = tuple(random.choices(list(models), [one.weight for one in models.values()]))
    steps: list[Step] = []
    for _ in range(random.randint(1, 4)):
        number = random.randrange(len(names))
        if random.random() < 0.2:
            steps.append(Step("set_budget", number, budget=_share(random)))
        if random.random() < 0.25:
            calls = (_call(random, number, models[names[number]]) for _ in range(random.randint(2, 4)))
            steps.append(Step("callers", number, calls=tuple(calls)))
        else:
            steps.append(_call(random, number, models[names[number]]))
    return Run(
        seed=seed,
        models=names,
        budget=_share(random),
        loaders=random.choice((None, None, None, 1, 2, 4)),
        threads=random.choice((None, None, 1, 2)),
        fresh=random.random() < 0.4,
        steps=tuple(steps),
    )


def _share(random: Random) -> Share:
    kind = random.random()
    if kind < 0.12:
        return Share(of_smallest=random.uniform(0.3, 0.999))
    if kind < 0.3:
        return Share(plus_bytes=random.randint(0, 4_000_000))
    if kind < 0.85:
        return Share(of_weights=random.uniform(0, 1.5), plus_bytes=random.randint(0, 1_000_000))
    return Share(of_weights=3, plus_bytes=100_000_000)


def _call(random: Random, number: int, model: Model) -> Step:
    seed = random.randrange(1 << 30)
    if model.kind == "decoder":
        length, new = random.randint(1, _LONGEST), random.randint(1, _NEW_TOKENS)
        if random.random() < 0.7:
            return Step("generate", number, ((length, new),), seed)
        return Step("run", number, ((random.randint(1, 2), length),), seed)
    if model.kind == "sentence" and random.random() < 0.5:
        return Step("embed", number, ((random.randint(1, 6), 0),), seed)
    rows, length = random.randint(1, _MOST_ROWS), random.randint(1, _LONGEST)
    if random.random() < 0.3:
        items = tuple((1, length) for _ in range(random.randint(2, 5)))
        return Step("run_many", number, items, seed, together=random.randint(1, 3))
    return Step("run", number, ((rows, length),), seed)


def texts(step: Step) -> list[str]:
    """What `embed` is given."""
    random = Random(step.seed)
    return [random.choice(_TEXTS) for _ in range(step.sizes[0][0])]


def tokens(step: Step, model: Model) -> list[int]:
    """The prompt of `generate`."""
    random = Random(step.seed)
    return [random.randrange(3, model.vocabulary) for _ in range(step.sizes[0][0])]
