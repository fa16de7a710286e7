"""Draw several continuations, and keep the one that the model itself finds the likeliest."""

import pipeload

with pipeload.load("models/exported/smollm2-135m", memory_budget="300MB") as model:
    drawn = model.generate(
        "The best thing about winter is",
        num_return_sequences=4,  # one batch: a sweep over the weights makes a token of each
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
        max_new_tokens=12,
        seed=7,
        logprobs=True,
    )
    for made in sorted(drawn, key=lambda each: -sum(each.logprobs) / len(each.logprobs)):
        print(f"{sum(made.logprobs) / len(made.logprobs):6.2f} {made.text!r}")
