"""Two texts at once in an asyncio program, each piece as it comes; what takes too long is ended."""

import asyncio

import pipeload

PROMPTS = {"France": "The capital of France is", "Italy": "The capital of Italy is"}


async def tell(model: pipeload.Model, name: str, prompt: str) -> str:
    text = ""
    with pipeload.TextStream() as stream:  # leaving it ends the generation, also where this task is cancelled
        making = asyncio.create_task(asyncio.to_thread(model.generate, prompt, max_new_tokens=8, streamer=stream))
        async for piece in stream:
            text += piece
        await making
    return f"{name}:{text}"


async def main() -> None:
    with pipeload.load("models/exported/smollm2-135m", memory_budget="300MB") as model:
        async with asyncio.timeout(120):
            for line in await asyncio.gather(*(tell(model, *each) for each in PROMPTS.items())):
                print(line)


asyncio.run(main())
