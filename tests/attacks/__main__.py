"""All attacks, one after another, with a table of how they ended.

python -m tests.attacks          print it
python -m tests.attacks --keep   write it into docs/reliability.md too
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.attacks.attack import all_attacks, attacks_of, names
from tests.proof.counts import Line, keep

_COMMAND = "python -m tests.attacks"


def main() -> int:
    """Run them; the number of those that succeeded."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description="Run all attacks.")
    parser.add_argument("--keep", action="store_true", help="write the counts into docs/reliability.md")
    asked = parser.parse_args()
    begin_s = time.perf_counter()
    failures: dict[str, int] = dict.fromkeys(names(), 0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PIPELOAD_CACHE"] = f"{folder}/cache"
        for number, one in enumerate(all_attacks()):
            own = Path(folder, str(number))
            own.mkdir()
            try:
                outcome = one.run(own)
            except BaseException:  # noqa: BLE001 - whatever it is, the attack has worked
                traceback.print_exc()
                outcome = "SUCCEEDED"
                failures[one.module] += 1
            print(f"{one.module:<20} {one.tries[:70]:<70} {outcome[:70]}", flush=True)
    seconds = time.perf_counter() - begin_s
    lines = [_line(name, failed) for name, failed in failures.items()]
    print(f"{sum(line.runs for line in lines)} attacks, {sum(failures.values())} succeeded, {seconds:.0f} s")
    if asked.keep:
        keep("attacks", _COMMAND, seconds, lines)
    return min(sum(failures.values()), 1)


def _line(name: str, failed: int) -> Line:
    module = sys.modules[f"tests.attacks.{name}"]
    first = str(module.__doc__).partition("\n")[0].rstrip(".")
    return Line(
        fault=f"[{name}](../tests/attacks/{name}.py): {first}",
        outcome="refused, or held",
        recovered="unchanged",
        runs=len(attacks_of(name)),
        failures=failed,
    )


if __name__ == "__main__":
    sys.exit(main())
