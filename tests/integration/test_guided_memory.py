"""What llguidance makes of a real tokenizer has its place in the budget, or the call is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.engine.harness import run_python

pytest.importorskip("llguidance")
pytest.importorskip("uvicorn")

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900), pytest.mark.xdist_group("serve")]

_MODEL = Path(__file__).parents[2] / "models" / "exported" / "smollm2-135m"
_PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from tests.engine.serve.client import running, settings
from pipeload.machine.memory import peak_rss_bytes

asked = {"messages": [{"role": "user", "content": "Name a city."}], "max_tokens": 6}
schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}

async def main():
    chosen = settings(Path(sys.argv[1]), budget=int(sys.argv[2]))
    print(chosen.budget)
    async with running(chosen) as client:
        path = "/v1/chat/completions"
        for body in (asked, asked, asked | form, asked):
            answer = await client.post(path, body)
            print(json.dumps({"status": answer.status, "body": answer.json(), "peak_bytes": peak_rss_bytes()}))

asyncio.run(main())
"""


@pytest.mark.parametrize(("budget_bytes", "status"), [(172_000_000, 400), (215_000_000, 200)])
def test_a_grammar_keeps_to_the_budget_or_is_refused(budget_bytes: int, status: int) -> None:
    if not (_MODEL / "pipeload.json").exists():
        pytest.skip(f"needs {_MODEL}, which make demo exports")
    done = run_python(_PROGRAM, _MODEL, budget_bytes, timeout_s=800, traced=False)
    process_budget_bytes, *told = [json.loads(line) for line in done.stdout.splitlines()]
    _, before, guided, after = told
    assert [one["status"] for one in told] == [200, 200, status, 200], told
    if status == 200:
        assert guided["body"]["choices"][0]["message"]["content"].startswith('{"city": "')
    else:
        error = guided["body"]["error"]
        assert error["code"] == "memory_budget_exceeded"
        assert error["message"].startswith("Answers by a grammar take up to 71.5 MB more here.")
    assert after["body"]["choices"] == before["body"]["choices"]
    # Of the process: what calls take beside models is in it. Before, the first answers have brought in what every one
    # needs. Without its place, the form takes 28 MB too many.
    assert after["peak_bytes"] <= max(process_budget_bytes, before["peak_bytes"])
