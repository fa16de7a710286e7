"""Runs the families, and writes what became of them.

    python -m tests.families.table                  all, into results.json and the table in docs/models.md
    python -m tests.families.table bert gpt2        some of them; the others stay as they are
    python -m tests.families.table --verdict wrong  those that were wrong the last time

Each takes about 20 seconds, and at most three minutes. Results are kept after each one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from tests.families.catalog import FAMILIES
from tests.families.compare import Result, compare
from tests.models import REPOSITORY

RESULTS = Path(__file__).with_name("results.json")
PAGE = REPOSITORY / "docs" / "models.md"
_BEGIN, _END = "<!-- families: made by python -m tests.families.table -->", "<!-- end of families -->"
_PACKAGES = ("transformers", "optimum-onnx", "torch", "onnxruntime")


def read_results() -> dict[str, Result]:
    """Name -> what became of it in its latest run."""
    if not RESULTS.exists():
        return {}
    return msgspec.convert(json.loads(RESULTS.read_bytes())["families"], dict[str, Result])


def write_results(results: dict[str, Result]) -> None:
    """Keep the results of the families that the catalog still has, with the versions of the libraries."""
    kept = {name: msgspec.to_builtins(results[name]) for name in FAMILIES if name in results}
    content: dict[str, Any] = {"versions": {name: version(name) for name in _PACKAGES}, "families": kept}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def table(results: dict[str, Result]) -> str:
    """The part of docs/models.md that is made from the results."""
    counts = Counter(result.verdict for result in results.values())
    used = ", ".join(f"{name} {number}" for name, number in json.loads(RESULTS.read_bytes())["versions"].items())
    lines = [
        f"{len(results)} models of {len({FAMILIES[name].model_type for name in results})} families: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("right", "refused", "wrong"))
        + f". With {used}.",
        "",
        "| family | task | result | blocks | inputs | worst difference | greedy tokens | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in FAMILIES:
        if name in results:
            lines.append(_row(name, results[name]))
    return "\n".join(lines)


def _row(name: str, result: Result) -> str:
    remarks = [result.reason] if result.reason else []
    by_reason: dict[str, list[str]] = {}
    for case, reason in result.refused_cases.items():
        by_reason.setdefault(reason, []).append(case)
    remarks += [f"refused: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    cells = [
        name,
        FAMILIES[name].task,
        result.verdict,
        str(result.blocks or ""),
        str(result.cases or ""),
        f"{result.worst:.1e}" if result.cases else "",
        f"{result.tokens} of {result.tokens_of}" if result.tokens_of else "",
        " ".join("; ".join(remarks).replace("|", "\\|").replace("<", "&lt;").split()),
    ]
    return f"| {' | '.join(cells)} |"


def write_page(results: dict[str, Result]) -> None:
    """Put the table between its two marks in docs/models.md."""
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    PAGE.write_text(f"{before}{_BEGIN}\n{table(results)}\n{_END}{after}")


def main() -> int:
    """Parse the command line, run the families, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; default: all")
    parser.add_argument("--verdict", action="append", help="only those that came out so the last time, or `new`")
    parser.add_argument("--keep", type=Path, help="a folder in which each family's files are left")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(FAMILIES):
        parser.error(f"no such families: {', '.join(sorted(unknown))}")
    results = read_results()
    names = arguments.names or list(FAMILIES)
    if arguments.verdict:
        names = [name for name in names if (results[name].verdict if name in results else "new") in arguments.verdict]
    for name in names:
        with tempfile.TemporaryDirectory(prefix="pipeload-families-") as temporary:
            folder = (arguments.keep or Path(temporary)) / name.replace("/", "-")
            result = compare(name, folder)
        print(f"{name:32} {result.verdict:8} {result.worst:8.1e} {result.tokens}/{result.tokens_of} "
              f"{result.seconds} s  {result.reason}", flush=True)  # fmt: skip
        results = read_results() | {name: result}
        write_results(results)
    write_page(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
