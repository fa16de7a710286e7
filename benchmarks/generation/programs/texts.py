"""pipeload continues prompts, one after another or all at once from a thread each, and reports times and bytes."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pipeload
from benchmarks.generation.programs.order import tell
from pipeload.bench.cgroup import read_bytes
from pipeload.bench.spec import from_json

_WARM_TOKENS = 4
"""Tokens before those that count: the resident shards are laid out for the CPU meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextsOrder:
    """The prompts to continue.

    Attributes:
        model: the sharded model directory.
        prompts: texts.
        options: keywords of `model.generate`.
        chat: prompts are questions, put into the model's chat template.
        at_once: each prompt from a thread of its own, instead of one after another.
    """

    model: str
    prompts: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    chat: bool = False
    at_once: bool = False


def main() -> None:
    order = from_json(sys.argv[1], TextsOrder)
    callers = len(order.prompts) if order.at_once else 1
    begin = threading.Barrier(callers)
    with pipeload.load(order.model) as model, ThreadPoolExecutor(callers) as pool:

        def asked(prompt: str) -> str | list[int]:
            return model.chat_prompt([{"role": "user", "content": prompt}]) if order.chat else prompt

        def ask(prompt: str) -> dict[str, Any]:
            if order.at_once:
                begin.wait()
            lap = time.perf_counter()
            made = model.generate(asked(prompt), do_sample=False, **order.options)
            return {
                "text": made.text,
                "token_ids": made.token_ids,
                "seconds": time.perf_counter() - lap,
                "sweeps": made.sweeps,
                "drafted_tokens": made.drafted_tokens,
                "accepted_tokens": made.accepted_tokens,
            }

        warm = order.options | {"max_new_tokens": _WARM_TOKENS}
        model.generate(asked(order.prompts[0]), do_sample=False, **warm)
        before, passes, lap = read_bytes(), model.stats.passes, time.perf_counter()
        texts = list(pool.map(ask, order.prompts))
        tell(
            {
                "texts": texts,
                "seconds": time.perf_counter() - lap,
                "sweeps": model.stats.passes - passes,
                "read_bytes": read_bytes() - before,
                "weight_bytes": model.manifest.weight_bytes,
                "resident_bytes": model.plan.resident_bytes,
            }
        )


if __name__ == "__main__":
    main()
