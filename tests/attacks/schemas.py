"""JSON schemas of `response_format` and of tools that are made to take time or memory, or to fetch something.

The attacker is a client of the server. He wants a request that keeps a processor, takes memory without end, or has the
server fetch an address of his.
"""

from __future__ import annotations

from pathlib import Path

from tests.attacks.attack import HELD, SucceededError, attack, in_child, run_module
from tests.attacks.victims import model_directory

_CODE = """
import sys
import llguidance
from pipeload.serve.errors import ApiError
from pipeload.serve.guided import json_grammar
tokenizer = llguidance.LLTokenizer(open(sys.argv[1]).read(), eos_token=[0])
deep = {"type": "object"}
for _ in range(60):
    deep = {"type": "object", "properties": {"a": deep}}
schemas = [
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
    {"type": "string", "pattern": "(((a|b)*c){1,99}d){1,99}"},
    {"type": "string", "maxLength": 10**9},
    {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    {"enum": [f"x{i}" for i in range(20000)]},
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"$ref": "http://127.0.0.1:9/schema.json"},
    {"$ref": "file:///etc/passwd"},
    {"multipleOf": 1e-300, "type": "number"},
    {"anyOf": [{"type": "string", "pattern": f"a{i}.*b"} for i in range(300)]},
    deep,
]
for schema in schemas:
    try:
        print(llguidance.LLMatcher.validate_grammar(json_grammar(schema, "response_format"), tokenizer)[:80] or "taken")
    except ApiError as error:
        print(str(error)[:80])
print("ended")
"""


@attack
def schemas_that_explode(folder: Path) -> str:
    """Patterns in patterns, enormous counts and lists, references in circles and to addresses: none is fetched."""
    told = in_child(_CODE, model_directory(folder) / "tokenizer.json", cpu_s=60)
    lines = told.splitlines()
    if lines[-1] != "ended" or "taken" in lines[8:10]:
        raise SucceededError(told)
    return HELD


if __name__ == "__main__":
    run_module(Path(__file__).stem)
