"""pipeload writes a long text; it reports the seconds of each token, and the memory of the process then."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from itertools import pairwise

import pipeload
from benchmarks.generation.programs.order import tell
from pipeload.bench.spec import from_json
from pipeload.machine.memory import peak_rss_bytes, rss_bytes
from pipeload.tracing.trace import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class LongOrder:
    """The text to write: a number of tokens after a prompt."""

    model: str
    prompt: str
    tokens: int


def main() -> None:
    order = from_json(sys.argv[1], LongOrder)
    times: list[float] = []
    occupied: list[int] = []

    def note(progress: Progress) -> None:
        if progress.index == progress.count:
            times.append(time.perf_counter())
            occupied.append(rss_bytes())

    with pipeload.load(order.model, progress=note) as model:
        times.append(time.perf_counter())
        made = model.generate(order.prompt, max_new_tokens=order.tokens, do_sample=False, eos_token_id=[])
        plan = model.plan
    tell(
        {
            "tokens": len(made.token_ids),
            "tokens_s": [round(after - before, 5) for before, after in pairwise(times)],
            "rss_bytes": occupied,
            "peak_rss_bytes": peak_rss_bytes(),
            "planned_peak_bytes": plan.peak_bytes,
            "budget_bytes": plan.budget_bytes,
            "cache_bytes": plan.cache_bytes,
        }
    )


if __name__ == "__main__":
    main()
