"""pipeload continues prompts with its own draft and without, in one process each; reports times, sweeps and guesses."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import pipeload
from benchmarks.generation.programs.order import tell
from pipeload.bench.spec import from_json
from pipeload.machine.memory import rss_bytes

_WARM_TOKENS = 12
"""Tokens before those that count: resident shards are read, and the number of guesses is learned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftedOrder:
    """The prompts to continue.

    Attributes:
        model: the sharded model directory.
        prompts: token ids.
        questions: further prompts, put into the model's chat template.
        weights_bytes: the budget beyond what the process takes without weights.
        tokens: of each answer.
        draft: as `pipeload.load` takes it.
    """

    model: str
    weights_bytes: int
    tokens: int
    prompts: tuple[tuple[int, ...], ...] = ()
    questions: tuple[str, ...] = ()
    draft: Literal["auto"] | None = None


def main() -> None:
    order = from_json(sys.argv[1], DraftedOrder)
    with pipeload.load(order.model, draft=None) as model:
        prompts = [
            *(list(ids) for ids in order.prompts),
            *(model.chat_prompt([{"role": "user", "content": question}]) for question in order.questions),
        ]
        model.generate(prompts[0], max_new_tokens=1)
        plan = model.plan
        beside_bytes = plan.process_bytes + plan.pass_bytes + plan.cache_bytes
    with pipeload.load(order.model, beside_bytes + order.weights_bytes, draft=order.draft) as model:

        def ask(prompt: list[int], tokens: int) -> dict[str, Any]:
            lap = time.perf_counter()
            made = model.generate(prompt, do_sample=False, max_new_tokens=tokens, eos_token_id=[])
            return {
                "token_ids": made.token_ids,
                "seconds": time.perf_counter() - lap,
                "sweeps": made.sweeps,
                "drafted_tokens": made.drafted_tokens,
                "accepted_tokens": made.accepted_tokens,
            }

        said = str(model.draft) if model.draft else None
        ask(prompts[0], _WARM_TOKENS)
        texts = [ask(prompt, order.tokens) for prompt in prompts]
        tell(
            {
                "texts": texts,
                "budget_bytes": beside_bytes + order.weights_bytes,
                "rss_bytes": rss_bytes(),
                "peak_bytes": model.stats.peak_bytes,
                "expected": said,
                "afterwards": str(model.draft) if model.draft else None,
                "draft_bytes": model.draft.draft_bytes if model.draft else 0,
            }
        )


if __name__ == "__main__":
    main()
