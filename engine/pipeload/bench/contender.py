"""One contender in a process of its own: `python -m pipeload.bench.contender SPEC.json` prints one JSON line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import pipeload
from pipeload.bench.cgroup import evict
from pipeload.bench.engines import ShardChain, SingleSession, one_after_the_other, one_ahead
from pipeload.bench.spec import PlanFacts, Result, Spec, from_json, to_json
from pipeload.bench.workload import Measured, Work, input_dims
from pipeload.errors import ConfigError, PipeloadError
from pipeload.format import manifest as manifests
from pipeload.machine.hardware import cores
from pipeload.machine.memory import peak_rss_bytes, rss_bytes
from pipeload.measuring import profile_store
from pipeload.model import Model
from pipeload.planning.planner import Plan
from pipeload.tasks.runner import Decoder

__all__ = ["main", "run"]


def main() -> int:
    """Read the spec that the command line names, run it, print the result."""
    spec = from_json(Path(sys.argv[1]).read_bytes(), Spec)
    try:
        result = run(spec)
    except PipeloadError as error:
        result = Result(error=str(error), peak_rss_bytes=peak_rss_bytes())
    print(to_json(result).decode())
    return 0


def run(spec: Spec) -> Result:
    """Open the model as the spec says and run its work. The harness, which has the reference, checks the answers."""
    manifest = manifests.read(spec.directory)
    weights = spec.weight_files()
    work = Work(
        manifest=manifest,
        directory=spec.directory,
        sizes=spec.sizes,
        settling=spec.settling,
        passes=spec.passes,
        before_pass=(lambda: evict(weights)) if spec.cold else lambda: None,
    )
    ask = _question(spec, work)
    before = rss_bytes()
    begin = time.perf_counter()
    plan = None
    with _opened(spec, manifest) as runner:
        # The prediction, taken before the plan learns from the passes that it is compared with.
        predicted = runner.plan if isinstance(runner, Model) else None
        measured = ask(runner, begin)
        if isinstance(runner, Model) and predicted is not None:
            plan = _plan_facts(predicted, runner.plan)
    if spec.outputs:
        np.savez(spec.outputs, **measured.outputs)  # type: ignore[arg-type]
    return Result(
        first_s=measured.first_s,
        passes_s=measured.passes_s,
        read_bytes=measured.read_bytes,
        before_bytes=before,
        peak_rss_bytes=peak_rss_bytes(),
        answer=measured.answer,
        plan=plan,
    )


def _question(spec: Spec, work: Work) -> Callable[[Decoder[Any], float], Measured]:
    """The work as a function; inputs are made now, outside the time of the first answer."""
    if spec.task == "embed":
        return lambda runner, begin: work.embed(list(spec.texts), runner, begin)
    if spec.task == "generate":
        prompt: str | list[int] = list(spec.prompt) if spec.prompt else spec.texts[0]
        return lambda runner, begin: work.generate(prompt, runner, begin)
    inputs = work.inputs()
    if spec.task == "decode":
        return lambda runner, begin: work.decode(inputs, runner, begin)
    return lambda runner, begin: work.run(inputs, runner, begin)


@contextmanager
def _opened(spec: Spec, manifest: manifests.Manifest) -> Iterator[Decoder[Any]]:
    if spec.contender == "pipeload":
        with _load(spec, manifest) as model:
            yield model
        return
    threads = spec.threads or cores()
    if spec.contender in ("single", "mmap"):
        if spec.unsplit is None:
            raise ConfigError(f"The contender {spec.contender} needs the unsplit model.")
        yield SingleSession(spec.directory, spec.unsplit, mapped=spec.contender == "mmap", threads=threads)
    elif spec.contender == "layerwise":
        yield ShardChain(spec.directory, one_after_the_other, threads=threads)
    else:
        keep = spec.contender == "pipeswitch"
        yield ShardChain(spec.directory, one_ahead(keep=keep), threads=threads)


def _load(spec: Spec, manifest: manifests.Manifest) -> Model:
    sizes = spec.sizes
    if spec.task in ("pass", "decode"):
        sizes = input_dims(manifest, spec.directory, spec.sizes)
    profile = profile_store.read(spec.profile) if spec.profile else None
    return pipeload.load(
        spec.directory,
        spec.budget,
        loaders=spec.loaders,
        threads=spec.threads,
        sizes=sizes,
        profile=profile,
        # Passes of the model are compared; all contenders make them.
        draft=None,
    )


def _plan_facts(predicted: Plan, final: Plan) -> PlanFacts:
    """The predictions of the first plan, and how the model runs by now."""
    return PlanFacts(
        budget_bytes=predicted.budget_bytes,
        peak_bytes=predicted.peak_bytes,
        first_s=predicted.first_pass_s,
        steady_s=predicted.steady_pass_s,
        resident_bytes=final.resident_bytes,
        loaders=final.loaders,
        buffers=final.buffers,
        threads=final.threads,
        packed=final.packed,
    )


if __name__ == "__main__":
    sys.exit(main())
