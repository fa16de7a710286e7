"""Inputs chosen by the code that they reach: libFuzzer, by atheris, with this package's own mutations.

libFuzzer ends its process itself, so it runs in one of its own. It keeps inputs that reach new places in a folder; the
best of them go into the corpus by `--minimise`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.corpora import CORPUS, keep
from tests.fuzz.run import Broken, Tally
from tests.fuzz.target import Target

__all__ = ["is_installed", "run_guided"]

_STATE = re.compile(r"cov: (\d+)")
_MOST_BYTES = 6000


def is_installed() -> bool:
    """Whether atheris is there: it is not for every machine."""
    return find_spec("atheris") is not None


def run_guided(target: Target, pool: Sequence[bytes], seed: int, *, inputs: int | None, seconds: float | None) -> Tally:
    """As `run`, with inputs that libFuzzer chooses; those that reach new places join the corpus."""
    with tempfile.TemporaryDirectory(prefix="pipeload-fuzz-") as name:
        folder = Path(name)
        (folder / "inputs").mkdir()
        for number, data in enumerate(pool):
            (folder / "inputs" / f"known-{number}").write_bytes(data)
        command = [sys.executable, "-m", "tests.fuzz.libfuzzer", target.name, str(folder), f"-seed={seed % 2**31 or 1}"]
        command += [f"-runs={inputs}"] if inputs else [f"-max_total_time={max(1, round(seconds or 60))}"]
        command += [f"-timeout={target.limit_s:.0f}", f"-max_len={4 * _MOST_BYTES}", "-rss_limit_mb=0"]
        command += [f"-artifact_prefix={folder}/crash-", str(folder / "inputs")]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        tally = Tally()
        if (folder / "tally").is_file():
            told = json.loads((folder / "tally").read_text())
            tally = Tally(**{key: value for key, value in told.items() if key != "broken"})
            tally.broken += [Broken(data=bytes.fromhex(data), reason=why, detail="") for data, why in told["broken"]]
        found = _STATE.findall(done.stderr)
        tally.covered = int(found[-1]) if found else 0
        for path in folder.glob("crash-*"):
            kind = path.name.split("-")[1]
            if kind != "slow":
                tally.broken.append(Broken(data=path.read_bytes(), reason=f"libFuzzer: {kind}"))
        if not found:
            raise RuntimeError(f"libFuzzer did not run: {done.stderr[-2000:]}")
        new = [path.read_bytes() for path in (folder / "inputs").iterdir() if not path.name.startswith("known-")]
        keep(CORPUS, target.name, sorted((data for data in new if len(data) <= _MOST_BYTES), key=len)[:400])
    return tally
