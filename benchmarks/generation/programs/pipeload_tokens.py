"""pipeload, a session that goes on token by token; its budget is the memory that the cgroup leaves ("auto")."""

from __future__ import annotations

from contextlib import ExitStack

import pipeload
from benchmarks.generation.programs.order import Step, decode, read_order, tell
from pipeload.errors import BudgetError


def main() -> None:
    order = read_order()
    with ExitStack() as stack:

        def open_model() -> Step:
            model = stack.enter_context(pipeload.load(order.model, threads=order.threads))
            session = stack.enter_context(model.session((1 + order.again) * len(order.prompt) + order.tokens))
            text: list[int] = []

            def step(new: list[int]) -> tuple[int, float]:
                text.extend(new)
                made = session.generate(text, max_new_tokens=1, do_sample=False, eos_token_id=[], logprobs=True)
                assert made.logprobs is not None
                plan = model.plan
                facts["resident_bytes"], facts["planned_peak_bytes"] = plan.resident_bytes, plan.peak_bytes
                return made.token_ids[0], made.logprobs[0]

            facts["weight_bytes"] = model.manifest.weight_bytes
            return step

        facts: dict[str, int] = {}
        try:
            told = decode(order, open_model, f"pipeload {pipeload.__version__}")
        except BudgetError as error:
            tell({"refused": str(error)})
            return
    tell(told | facts)


if __name__ == "__main__":
    main()
