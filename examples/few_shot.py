"""Sort texts into classes of which a few examples are known, without training."""

import numpy as np

import pipeload

EXAMPLES = {
    "billing": ["I was charged twice.", "Please refund my payment.", "The invoice is wrong."],
    "delivery": ["My parcel has not arrived.", "Where is my order?", "The box was damaged."],
    "account": ["I cannot log in.", "How do I change my password?", "Delete my profile."],
}
TEXTS = ["The courier never came.", "My credit card shows two payments.", "I forgot the code to sign in."]

with pipeload.load("models/exported/minilm", memory_budget="160MB") as model:
    classes = np.stack([model.embed(texts, normalize=True).mean(0) for texts in EXAMPLES.values()])
    scores = model.embed(TEXTS, normalize=True) @ classes.T
for text, row in zip(TEXTS, scores, strict=True):
    print(f"{list(EXAMPLES)[row.argmax()]:8}  {text}")
