"""The process in which libFuzzer runs: python -m tests.fuzz.libfuzzer TARGET FOLDER ARGUMENT ...

It writes its counts into the file `tally` of the folder, whose folder `inputs` has the known ones. See `guided`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import atheris

with atheris.instrument_imports(include=["pipeload", "pipeload_export"]):
    from tests.fuzz.run import checked
    from tests.fuzz.targets import target_of

    TARGET = target_of(sys.argv[1])

_EACH_S = 0.5
_MOST_BROKEN = 5


def main() -> None:
    """Run until libFuzzer ends the process."""
    folder, arguments = Path(sys.argv[2]), sys.argv[3:]
    trial = TARGET.prepare()
    tally: dict[str, Any] = {"inputs": 0, "refused": 0, "answered": 0, "peak_bytes": 0, "seconds": 0.0, "broken": []}
    pool = [path.read_bytes() for path in (folder / "inputs").iterdir()]
    reasons: dict[str, int] = {}
    begun, written = time.monotonic(), 0.0

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = Random(seed)
        if chance.random() < 0.2:
            return bytes(atheris.Mutate(data, most))
        return TARGET.mutate(chance, [data] if chance.random() < 0.9 else pool)[:most]

    def read(data: bytes) -> None:
        nonlocal written
        right, reason, _ = check(trial, data)
        tally["inputs"] += 1
        tally["answered" if right else "refused"] += not reason
        reasons[reason] = reasons.get(reason, 0) + 1
        if reason and reasons[reason] <= _MOST_BROKEN:
            tally["broken"].append((data.hex(), reason))
        now = time.monotonic()
        if now - written > _EACH_S:
            written = now
            tally["seconds"] = now - begun
            tally["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            (folder / "tally").write_text(json.dumps(tally))

    with checked(TARGET) as check:
        atheris.Setup(["fuzz", *arguments], read, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
