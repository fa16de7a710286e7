"""Take the smallest budget that works, and let a running model give memory back when the program needs it."""

import pipeload

DIRECTORY = "models/exported/smollm2-135m"

try:
    pipeload.load(DIRECTORY, memory_budget="60MB")
except pipeload.BudgetError as error:
    needed = error.needed_bytes
    print("refused before any weight was read:", needed > 60_000_000)

with pipeload.load(DIRECTORY, memory_budget="300MB") as model:
    before = model.plan.resident_bytes
    first = model.generate("The capital of France is", max_new_tokens=8).text
    model.set_budget("150MB")  # what is above it has been given back when this returns
    second = model.generate("The capital of France is", max_new_tokens=8).text
    print("fewer bytes of weights stay in memory:", model.plan.resident_bytes < before)
    print("the same text:", first == second, repr(first))
    print("never above the budget:", model.stats.peak_bytes <= 300_000_000)
