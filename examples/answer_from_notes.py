"""Answer a question from one's own notes: search by one model, text by another, both under budgets in one process."""

import sys
from pathlib import Path

import pipeload

notes = Path("examples/notes.txt").read_text().splitlines()
question = sys.argv[1]
with pipeload.load("models/exported/minilm", memory_budget="200MB") as encoder:
    scores = encoder.embed(notes, normalize=True) @ encoder.embed(question, normalize=True)
best = [notes[index] for index in (-scores).argsort()[:2]]
prompt = f"Notes: {' '.join(best)}\nAnswer in one sentence: {question}"
with pipeload.load("models/exported/smollm2-135m", memory_budget="300MB") as model:
    ids = model.chat_prompt([{"role": "user", "content": prompt}])
    print(model.generate(ids, max_new_tokens=40).text)
