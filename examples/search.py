"""Find the lines of a file that say what a query says: `python examples/search.py FILE QUERY`."""

import sys
from pathlib import Path

import pipeload

file, query = sys.argv[1:]
lines = [line for line in Path(file).read_text().splitlines() if line.strip()]
with pipeload.load("models/exported/minilm", memory_budget="160MB") as model:
    documents = model.embed(lines, normalize=True)  # [lines, 384]
    wanted = model.embed(query, normalize=True)  # [384]
scores = documents @ wanted
for index in (-scores).argsort()[:3]:
    print(f"{scores[index]:.2f}  {lines[index]}")
