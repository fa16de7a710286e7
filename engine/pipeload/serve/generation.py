"""Tokens of answers as they come, from the thread that generates them to the task that sends them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeload.errors import BudgetError
from pipeload.serve.admission import Place
from pipeload.serve.metrics import Metrics
from pipeload.serve.models import Served
from pipeload.serve.sampling import Order
from pipeload.tasks.generate.options import GenerationOptions
from pipeload.tasks.generate.sequence import Generation, NewToken

if TYPE_CHECKING:
    from pipeload.model import Model

__all__ = ["Answers", "generated"]


@dataclass(slots=True)
class Answers:
    """What a generation has made.

    Attributes:
        results: all answers, those to the first prompt first; empty until it has ended.
        prompt_tokens: of all prompts.
        cached_tokens: those of them that were not computed again.
        tokens: of all answers.
    """

    results: list[Generation] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0


async def generated(
    place: Place, served: Served, model: Model, order: Order, metrics: Metrics, answers: Answers
) -> AsyncGenerator[NewToken, None]:
    """The tokens of all answers as they come; `answers` is complete when they end.

    A generation whose KV caches have no room now waits until another one has ended.

    Raises:
        ClientGone: the client went away.
        PipeloadError: as `generate`; BudgetError when there would be no room alone either.
    """
    loop = asyncio.get_running_loop()
    came: asyncio.Queue[NewToken | None] = asyncio.Queue()
    begin_s = time.perf_counter()
    first_s: float | None = None

    def tell(token: NewToken) -> None:
        loop.call_soon_threadsafe(came.put_nowait, token)

    def reused(tokens: int) -> None:
        answers.cached_tokens = tokens

    def call() -> list[Generation]:
        prompts = [list(prompt) for prompt in order.prompts]
        options: GenerationOptions = {**order.options, "on_token": tell}
        return served.prefixes.generate(model, prompts, order.drawn, options, reused)

    async with served.generates() as wait_for_room:
        while True:
            task = asyncio.ensure_future(place.run(call))
            task.add_done_callback(lambda _: came.put_nowait(None))
            try:
                while (token := await came.get()) is not None:
                    if first_s is None:
                        first_s = time.perf_counter()
                        metrics.first_token(served.name, first_s - begin_s)
                    yield token
                results = await task
                break
            except BudgetError as error:
                if first_s is not None or place.left:
                    raise
                await wait_for_room(error)
            finally:
                if not task.done():
                    # The reader of the tokens has gone.
                    place.leave()
                    await asyncio.wait([task])
    copies = order.copies // order.drawn
    answers.results = [one for one in results for _ in range(copies)]
    answers.prompt_tokens = sum(map(len, order.prompts))
    answers.tokens = sum(len(one.token_ids) for one in answers.results)
    metrics.generated(served.name, results, answers.prompt_tokens, time.perf_counter() - (first_s or begin_s))
