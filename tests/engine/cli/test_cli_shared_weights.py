"""Commands about a model whose layers have the same weights: each figure counts those as often as they are."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from pipeload.cli import app
from pipeload.format import manifest as manifests
from pipeload.machine.memory import rss_bytes
from pipeload.measuring import profile_store
from pipeload.planning.profile import Profile, ShardTimes

TIMES = ShardTimes(session_s=1e-4, run_s=1e-4, loading_run_s=1e-4, pack_s=1e-2, packed_run_s=1e-4)


def _out(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_inspect_names_the_shard_whose_weights_others_have_too(toy_large_common: Path) -> None:
    manifest = manifests.read(toy_large_common)
    blocks = [shard for shard in manifest.shards if shard.role == "block"]
    text = _out("inspect", toy_large_common)
    assert text.count("those of block.000") == len(blocks) - 1
    facts = json.loads(_out("inspect", toy_large_common, "--json"))
    owners = {shard["name"]: shard["weights_of"] for shard in facts["shards_in_order"]}
    assert owners == {shard.name: "block.000" if shard in blocks else shard.name for shard in manifest.shards}
    # What a pass reads while nothing stays.
    assert facts["pass_bytes"] == sum(shard.nbytes for shard in manifest.shards) > facts["directory_bytes"]


def test_plan_counts_them_once_in_memory_and_in_the_bound(toy_large_common: Path, tmp_path: Path) -> None:
    manifest = manifests.read(toy_large_common)
    profile = Profile(
        process_bytes=rss_bytes(), cores=1, read_bytes_per_s={1: 1e9},
        times={1: {shard.name: TIMES for shard in manifest.shards}},
    )  # fmt: skip
    file = tmp_path / "profile.json"
    profile_store.write(profile, file)
    facts = json.loads(_out("plan", toy_large_common, f"--profile={file}", "--budget=4GB", "--json"))
    plan, smallest = facts["plan"], facts["smallest_budget_bytes"]
    assert plan["streamed_bytes"] == 0
    assert plan["resident_bytes"] == manifest.weight_bytes
    assert plan["first_bound_s"] < manifest.weight_bytes / 1e9 + len(manifest.shards) * TIMES.run_s
    facts = json.loads(_out("plan", toy_large_common, f"--profile={file}", f"--budget={smallest}", "--json"))
    plan = facts["plan"]
    assert plan["peak_bytes"] <= smallest
    # While the range is streamed, each block reads it; no schedule must.
    assert plan["streamed_bytes"] > manifest.weight_bytes
    assert plan["steady_bound_s"] <= manifest.weight_bytes / 1e9
