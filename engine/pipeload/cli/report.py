"""The reports of export, inspect and verify about a sharded model directory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from pipeload.cli.terminal import say
from pipeload.format.manifest import Manifest, Parity, ShardError, SmallWeights, Verification
from pipeload.machine.sizes import format_bytes

__all__ = ["accuracy_report", "differences", "parity_report", "print_json", "print_table", "summary", "table"]


def print_json(value: Any) -> None:
    """Print a dict, list or dataclass as JSON."""
    say(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def summary(manifest: Manifest) -> dict[str, Any]:
    """A few facts about the model; keys of sizes end with `_bytes`."""
    missing = {"missing_weights": len(manifest.missing_weights)} if manifest.missing_weights else {}
    small = manifest.small_weights
    weights = {}
    stored = {spec.dtype for shard in manifest.shards for spec in shard.tensors if spec.widened}
    if small and small.gguf:
        weights["weights"] = f"{', '.join(small.gguf)} of the GGUF file"
    elif small and not small.dtype:
        scales = "a scale for each output" if small.integers else f"{small.block_size} to a scale"
        weights["weights"] = f"int{small.bits}, {scales}"
    elif stored:
        rounded = f", rounded to {small.dtype}" if small else ""
        weights["weights"] = f"stored in {' and '.join(sorted(stored))}, used in float32{rounded}"
    return {
        "source": manifest.source,
        "model_type": manifest.model_type,
        "task": manifest.task,
        **weights,
        "shards": len(manifest.shards),
        "blocks": sum(shard.role == "block" for shard in manifest.shards),
        "pass_bytes": sum(shard.nbytes for shard in manifest.shards),
        "largest_shard_bytes": max(shard.nbytes for shard in manifest.shards),
        "directory_bytes": sum(record.nbytes for record in manifest.files),
        **({"draft_bytes": manifest.draft.nbytes} if manifest.draft else {}),
        **missing,
    }


def print_table(title: str, facts: Mapping[str, Any]) -> None:
    """Print facts, one a line; sizes with a unit."""
    say(title)
    rows = [
        (key.removesuffix("_bytes").replace("_", " "), format_bytes(value) if key.endswith("_bytes") else str(value))
        for key, value in facts.items()
    ]
    say(table(rows))


def parity_report(found: Parity | None) -> str:
    """How the streamed model compared with its source."""
    if found is None:
        return "  not compared with the source"
    facts = [f"{len(found.cases)} inputs" + (f" of up to {found.longest} tokens" if found.longest else "")]
    if found.tokens:
        facts.append(f"{found.tokens_equal} of {found.tokens} greedy tokens equal")
    if found.beyond:
        facts.append(f"not beyond {', '.join(map(str, found.beyond))} tokens, which the config names too")
    if vectors := found.vectors:
        most = f"up to {vectors.longest} tokens{', cut there' if vectors.cut else ''}"
        facts.append(f"vectors of {len(vectors.cases)} calls of embed with texts of {most}")
    facts.append(", ".join(f"{library} {version}" for library, version in found.versions.items()))
    compared = (*found.outputs, vectors.difference) if vectors else found.outputs
    return f"{differences(compared)}\n  {'; '.join(facts)}"


def accuracy_report(small: SmallWeights) -> str:
    """How weights are kept, and what that did to the answers."""
    how, found = _blocks_report(small) if small.gguf else _rounding_report(small), small.accuracy
    if found is None:
        return f"{how}\n  not compared with the source"
    rows = [("output", "worst error", "mean error", "worst of its range")]
    rows += [
        (one.output, f"{one.max_abs_error:.2e}", f"{one.mean_abs_error:.2e}", f"{one.max_rel_error:.2e}")
        for one in found.outputs
    ]
    facts = [f"{len(found.inputs)} input{'s' * (len(found.inputs) != 1)}"]
    if found.cosine is not None:
        facts.append(f"cosine at least {found.cosine:.5f}")
    if found.top1 is not None:
        facts.append(f"{found.top1:.1%} of the first choices equal")
    if found.perplexity is not None and found.source_perplexity:
        change = found.perplexity / found.source_perplexity - 1
        facts.append(f"perplexity {found.perplexity:.2f}, the source's {found.source_perplexity:.2f} ({change:+.2%})")
    own = f"\n{_shards_report(found.shards)}" if found.shards else ""
    return f"{how}\n{table(rows)}\n  {'; '.join(facts)}{own}"


def _shards_report(errors: Sequence[ShardError]) -> str:
    """What each shard's own rounding does."""
    rows = [("shard", "worst of its range", "mean of its range")]
    rows += [(one.shard, f"{one.max_rel_error:.2e}", f"{one.mean_rel_error:.2e}") for one in errors]
    return f"  what the rounding of each shard does to its own outputs:\n{table(rows)}"


def _blocks_report(small: SmallWeights) -> str:
    total = sum(small.gguf.values())
    kinds = ", ".join(f"{kind} ({count / total:.0%})" for kind, count in small.gguf.items())
    floats = f"; floats here, though not there: {', '.join(small.floats)}" if small.floats else ""
    return f"  the GGUF file's own blocks: {kinds}{floats}"


def _rounding_report(small: SmallWeights) -> str:
    levels: dict[str, list[str]] = {}
    for shard, level in small.kept.items():
        levels.setdefault(level, []).append(shard)
    kept = "".join(f"\n  wider, {level}: {', '.join(shards)}" for level, shards in levels.items())
    return f"{_narrow_report(small)}{kept}"


def _narrow_report(small: SmallWeights) -> str:
    if small.dtype:
        return f"  large weights rounded to {small.dtype}"
    if small.integers:
        return (
            f"  products in {small.bits} bits, a scale for each output, activations in 14; "
            f"tables with {small.block_size} weights to a scale"
        )
    zero = "" if small.symmetric else ", each block with its own zero"
    fine = f", tables and products that narrow in {small.fine_bits}" if small.fine_bits != small.bits else ""
    return f"  products in {small.bits} bits{fine}; {small.block_size} weights to a scale{zero}"


def differences(found: Iterable[Verification]) -> str:
    """The worst differences; outputs whose names differ only in a number share a line."""
    worst: dict[str, list[Verification]] = {}
    for result in found:
        worst.setdefault(re.sub(r"\d+", "*", result.output), []).append(result)
    if not worst:
        return "  not compared with the unsplit model"
    rows = [("output", "worst difference", "of its range", "limit")]
    for name, group in worst.items():
        result = max(group, key=lambda each: each.max_rel_error)
        absolute, relative = f"{result.max_abs_error:.2e}", f"{result.max_rel_error:.2e}"
        rows.append((name if len(group) > 1 else result.output, absolute, relative, f"{result.limit:g}"))
    return table(rows)


def table(rows: Iterable[Iterable[str]]) -> str:
    """Columns of text, each as wide as its widest cell; plain, so that grep and awk can read it as well."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
