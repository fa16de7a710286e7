"""`draft="int4"` puts a smaller copy of a decoder beside it: complete, listed, checked; other models are refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.exporter.models import write_onnx
from tests.models import ARCHITECTURES, seeded, traced_here

import pipeload
from pipeload.errors import ConfigError, ShardError
from pipeload.format.manifest import MANIFEST_NAME, read
from pipeload.planning.drafting import Contender, Drafting
from pipeload.planning.planner import process_bytes
from pipeload_export import export, verify

_BUDGET = 1_500_000_000


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as an ONNX file, with its config beside it."""
    folder = tmp_path_factory.mktemp("unsplit")
    _, model_class, config_class, options = ARCHITECTURES["llama"]
    seeded(model_class, config_class, options).save_pretrained(folder / "checkpoint")
    with traced_here():
        export(folder / "checkpoint", folder / "whole", task="text-generation", keep_onnx=folder / "onnx")
    return folder / "onnx" / "model.onnx"


@pytest.fixture(scope="module")
def drafted(unsplit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("drafted") / "model"
    export(unsplit, target, task="text-generation", draft="int4")
    return target


def test_the_draft_is_complete_and_every_file_of_it_is_listed(drafted: Path) -> None:
    manifest = read(drafted)
    assert manifest.draft
    assert manifest.small_weights is None, "the model itself is as it was"
    inner = read(drafted / manifest.draft.path)
    assert inner.small_weights
    assert (inner.small_weights.bits, inner.task) == (4, manifest.task)
    assert manifest.draft.nbytes == inner.weight_bytes < manifest.weight_bytes
    assert inner.small_weights.accuracy
    assert manifest.draft.top1 == inner.small_weights.accuracy.top1
    assert 0 < (manifest.draft.top1 or 0) <= 1
    assert inner.verification, "its shards were held against its own graph"
    on_disk = {path.relative_to(drafted).as_posix() for path in drafted.rglob("*") if path.is_file()}
    known = {record.path for record in manifest.files} | {f"draft/{record.path}" for record in inner.files}
    assert on_disk == known | {MANIFEST_NAME}
    record = next(record for record in manifest.files if record.path == f"draft/{MANIFEST_NAME}")
    assert hashlib.sha256((drafted / record.path).read_bytes()).hexdigest() == record.sha256


def test_the_model_is_the_one_without_a_draft(unsplit: Path, drafted: Path, tmp_path: Path) -> None:
    plain, made = export(unsplit, tmp_path / "plain", task="text-generation"), read(drafted)
    assert plain.draft is None
    assert [shard.weights for shard in plain.shards] == [shard.weights for shard in made.shards]


def test_verify_reads_the_draft_too(drafted: Path) -> None:
    file = next((drafted / "draft" / "shards").glob("block*.safetensors"))
    whole = file.read_bytes()
    assert verify(drafted).files == len(read(drafted).files) + len(read(drafted / "draft").files)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(ShardError, match=r"^The draft in 'draft': .*'shards/block.*' is damaged"):
            verify(drafted)
    finally:
        file.write_bytes(whole)


def test_the_draft_opens_by_itself(drafted: Path) -> None:
    with pipeload.load(drafted / "draft") as model:
        assert len(model.generate([1, 2, 3], max_new_tokens=2, eos_token_id=[]).token_ids) == 2


def test_the_model_takes_its_guesses(drafted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Drafting(used=True, draft_bytes=60_000_000, model_bytes=200_000_000, acceptance=0.9, drafts=4, sweep_s=1.0)

    def weigh(model: Contender, *_: object, **__: object) -> Drafting:
        free = _BUDGET - process_bytes(model.profile)
        return replace(told, model_bytes=free - told.draft_bytes)

    monkeypatch.setattr("pipeload.opening.weigh", weigh)
    options = {"max_new_tokens": 24, "eos_token_id": []}
    with pipeload.load(drafted, _BUDGET) as model:
        made = model.generate([5, 6, 7], **options)
        sampled = model.generate([5, 6, 7], do_sample=True, seed=1, temperature=0.3, **options)
    with pipeload.load(drafted, _BUDGET, draft=None) as model:
        assert model.generate([5, 6, 7], **options).token_ids == made.token_ids
        drawn = model.generate([5, 6, 7], do_sample=True, seed=1, temperature=0.3, **options)
    assert drawn.token_ids == sampled.token_ids
    assert made.accepted_tokens + sampled.accepted_tokens > 10
    assert made.sweeps < len(made.token_ids)


def test_models_that_do_not_generate_are_refused_in_one_sentence(tmp_path: Path) -> None:
    source = write_onnx(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match=r"^A draft guesses tokens .* this one is for feature-extraction\. Leave"):
        export(source, tmp_path / "target", draft="int4")
    with pytest.raises(ConfigError, match="text-generation without KV caches"):
        export(source, tmp_path / "target", draft="int4", task="text-generation", verify=False)
    assert not (tmp_path / "target").exists()


def test_a_draft_beside_as_few_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"A draft of int4 is no smaller than a model with weights of int4"):
        export(tmp_path / "absent.onnx", tmp_path / "target", weights="int4", draft="int4")
    with pytest.raises(ConfigError, match="The draft cannot be 'int3'"):
        export(tmp_path / "absent.onnx", tmp_path / "target", draft="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "elsewhere"}, "the manifest of the draft in 'elsewhere' is not in the list of files"),
        ({"top1": 1.5}, "1.5 of its first choices"),
        ({"nbytes": -1}, "the draft has -1 bytes"),
    ],
    ids=str,
)
def test_a_wrong_record_of_the_draft_is_a_fault(
    drafted: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    found = json.loads((drafted / MANIFEST_NAME).read_bytes())
    found["draft"] |= change
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(found))
    with pytest.raises(pipeload.ManifestError, match=said):
        read(tmp_path)
