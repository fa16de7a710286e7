"""A conversation whose answers appear word by word; each turn computes only what is new."""

import sys

import pipeload

with pipeload.load("models/exported/smollm2-135m", memory_budget="256MB") as model, model.session() as session:
    messages = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        made = session.generate(
            model.chat_prompt(messages),
            max_new_tokens=40,
            streamer=lambda piece: print(piece, end="", flush=True),
        )
        print()
        messages.append({"role": "assistant", "content": made.text})
