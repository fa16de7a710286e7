"""What the tokenizers library takes for a long text has its place in a server's budget, or the text is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.engine.harness import run_python

pytest.importorskip("uvicorn")
pytest.importorskip("tokenizers")

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900), pytest.mark.xdist_group("serve")]

_MODELS = Path(__file__).parents[2] / "models" / "exported"
_BUDGET_BYTES = 330_000_000
_PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from tests.engine.serve.client import running, settings
from pipeload.machine.memory import peak_rss_bytes

words, marks = "the cat sat on mats in green gardens " * 2000, ".," * 200_000
embeddings = lambda text: ("/embed", {"inputs": text, "truncate": True})
chat = lambda text: ("/v1/completions", {"model": "smollm2-135m", "prompt": text, "max_tokens": 2})
tokens = lambda text: ("/tokenize", {"model": "smollm2-135m", "prompt": text})

async def main():
    chosen = settings(*map(Path, sys.argv[2:]), budget=int(sys.argv[1]))
    print(chosen.budget)
    async with running(chosen) as client:
        asked = [make(text) for text in ("the cat", words, marks, "the cat") for make in (embeddings, chat, tokens)]
        asked += [embeddings([words] * 20), embeddings("a" * (1 << 20) + "b"), embeddings("the cat")]
        for path, body in asked:
            answer = await client.post(path, body)
            error = answer.json()["error"] if answer.status != 200 else {}
            print(json.dumps({"status": answer.status, "error": error, "peak_bytes": peak_rss_bytes()}))
        crowd = await asyncio.gather(*(client.post(*make(words)) for make in (embeddings, tokens) for _ in range(8)))
        print(json.dumps({"status": [answer.status for answer in crowd], "peak_bytes": peak_rss_bytes()}))

asyncio.run(main())
"""


def test_long_texts_keep_to_the_budget_or_are_refused() -> None:
    directories = [_MODELS / "minilm", _MODELS / "smollm2-135m"]
    if not all((directory / "pipeload.json").exists() for directory in directories):
        pytest.skip(f"needs {_MODELS}, which make demo exports")
    done = run_python(_PROGRAM, _BUDGET_BYTES, *directories, timeout_s=800, traced=False)
    budget_bytes, *told = [json.loads(line) for line in done.stdout.splitlines()]
    assert max(one["peak_bytes"] for one in told) <= budget_bytes
    short, words, marks, again = ([one["status"] for one in told[place : place + 3]] for place in (0, 3, 6, 9))
    assert short == again == [200, 200, 200]
    assert words == [200, 400, 200], "the model for chat has 8,192 positions"
    assert marks == [400, 400, 400]
    for one in told[6:9]:
        assert one["error"]["code"] == "memory_budget_exceeded"
        assert "A text of 400000 characters takes up to" in one["error"]["message"]
    several, beyond, after, crowd = told[12:]
    assert crowd["status"] == [200] * 16
    assert (several["status"], beyond["status"], after["status"]) == (200, 400, 200)
    assert beyond["error"]["message"].startswith("A text has 1048577 characters, and at most 1048576 are taken.")
