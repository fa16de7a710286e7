"""Try readers with inputs by the million: python -m tests.fuzz [TARGET ...].

Without TARGET all are tried. Inputs come from those in tests/fuzz/corpus, mutated by a seed; those that break a promise
go to tests/fuzz/found/TARGET, where an ordinary test reads them from then on.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz import corpora
from tests.fuzz.counted import add, counted, publish
from tests.fuzz.guided import is_installed, run_guided
from tests.fuzz.minimise import least_corpus, smaller
from tests.fuzz.run import Tally, inputs_of, run, try_all
from tests.fuzz.strategies import drawn
from tests.fuzz.target import Target
from tests.fuzz.targets import NAMES, target_of


def main() -> int:
    """Parse the command line, run, and tell what came of it; the exit code is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {' '.join(NAMES)}; default: all")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--seconds", type=float, help="for all targets together; default: 60")
    amount.add_argument("--inputs", type=int, help="inputs for each target")
    parser.add_argument("--seed", type=int, help="of the inputs; default: another one each time")
    parser.add_argument("--guided", action="store_true", help="let atheris choose the inputs by the code they reach")
    parser.add_argument("--replay", type=Path, help="a file, or a folder of files: try these inputs of one TARGET")
    parser.add_argument("--known", action="store_true", help="only the inputs of corpus and found, once each")
    parser.add_argument("--minimise", action="store_true", help="make the corpus, or the file to replay, smaller")
    parser.add_argument("--keep", action="store_true", help="add the counts to those in docs/reliability.md")
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in NAMES]:
        parser.error(f"{unknown[0]} is no target. There are: {' '.join(NAMES)}.")
    if options.replay and len(options.targets) != 1:
        parser.error("--replay takes the name of the one TARGET whose input the file is.")
    if options.guided and not is_installed():
        parser.error("--guided needs atheris: pip install 'pipeload[fuzz]'.")
    if options.guided and options.keep:
        parser.error("--keep counts the inputs of a seed: those of --guided are others in each run.")
    # Before any library is imported: their threads would not survive a fork.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    targets = [target_of(name) for name in options.targets or NAMES]
    if options.known:
        return max(_known(target) for target in targets)
    if options.replay:
        return _replay(targets[0], options.replay, minimise=options.minimise)
    if options.minimise:
        for target in targets:
            least_corpus(target)
        return 0
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    before = counted() if options.keep else {}
    if any(target.name in before and seed in before[target.name].seeds for target in targets):
        parser.error(f"the inputs of seed {seed} are counted: choose another --seed.")
    print(f"seed {seed}", flush=True)
    tallies = _run_all(targets, options, seed)
    if options.keep:
        named = {target.name: tally for target, tally in zip(targets, tallies, strict=True)}
        publish([target_of(name) for name in NAMES], add(named, seed))
    return int(any(tally.broken for tally in tallies))


def _run_all(targets: Sequence[Target], options: argparse.Namespace, seed: int) -> list[Tally]:
    shares = sum(target.share for target in targets)
    seconds = None if options.inputs else (options.seconds or 60.0)
    tallies = []
    for target in targets:
        part = None if seconds is None else seconds * target.share / shares
        pool = [*corpora.known(corpora.CORPUS, target.name), *target.seeds(), *drawn(target.name, seed)]
        if options.guided:
            tally = run_guided(target, pool, seed, inputs=options.inputs, seconds=part)
        else:
            # Counts of several runs add up, and known inputs are in those of the first one.
            first = len(pool) if options.keep and target.name in counted() else 0
            tally = run(target, inputs_of(target, pool, seed, first=first), inputs=options.inputs, seconds=part)
        tallies.append(tally)
        _tell(target, tally)
    return tallies


def _tell(target: Target, tally: Tally) -> None:
    covered = f", {tally.covered} places reached" if tally.covered else ""
    print(
        f"{target.name}: {tally.inputs:,} inputs, {tally.refused:,} refused, {tally.answered:,} answered{covered}, "
        f"{len(tally.broken)} broke a promise; {tally.seconds:.1f} s, "
        f"{tally.inputs / max(tally.seconds, 1e-9):,.0f}/s, "
        f"slowest {tally.slowest_s:.3f} s (input {tally.slowest}), peak {tally.peak_bytes / 1e6:.0f} MB",
        flush=True,
    )
    for reason in dict.fromkeys(broken.reason for broken in tally.broken):
        same = [broken for broken in tally.broken if broken.reason == reason]
        print(f"  {len(same)} x {reason}", flush=True)
        inputs = [(broken.data, broken.detail) for broken in same if broken.data is not None]
        if inputs:
            shortest, detail = min(inputs, key=lambda pair: len(pair[0]))
            (path,) = corpora.keep(corpora.FOUND, target.name, [shortest])
            print(f"{detail}  {shortest[:200]!r}")
            print(f"  again: python -m tests.fuzz {target.name} --replay {os.path.relpath(path)}", flush=True)


def _replay(target: Target, path: Path, *, minimise: bool) -> int:
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    tally = _try_known(target, [file.read_bytes() for file in files])
    if minimise and tally.broken:
        files[0].write_bytes(smaller(target, tally.broken[0]))
        print(f"{files[0]} has {files[0].stat().st_size} bytes now")
    return int(bool(tally.broken))


def _known(target: Target) -> int:
    inputs = [data for folder in (corpora.CORPUS, corpora.FOUND) for data in corpora.known(folder, target.name)]
    return int(bool(inputs and _try_known(target, inputs).broken))


def _try_known(target: Target, inputs: Sequence[bytes]) -> Tally:
    tally = try_all(target, inputs)
    for broken in tally.broken:
        print(f"{(broken.data or b'')[:200]!r}: {broken.reason}\n{broken.detail}")
    print(f"{target.name}: {tally.refused} refused, {tally.answered} answered, {len(tally.broken)} broke a promise")
    return tally


if __name__ == "__main__":
    sys.exit(main())
