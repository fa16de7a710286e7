"""A manifest of any content is accepted or refused, with its faults, in time in proportion to its size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeload
from pipeload.errors import ManifestError
from pipeload.format import manifest as manifests
from pipeload.format.manifest import MANIFEST_NAME

Change = Callable[[Any], object]


def _set(*path: str | int, to: Any) -> Change:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def _edit(directory: Path, change: Change) -> Path:
    path = directory / MANIFEST_NAME
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    return directory


def _overlap(content: Any) -> None:
    one, other, *_ = content["shards"][2]["tensors"]
    other["offset"] = one["offset"]


def _double_tensor(content: Any) -> None:
    tensors = content["shards"][2]["tensors"]
    tensors.append(tensors[0])


def _negative_error(content: Any) -> None:
    content["verification"].append({"output": "x", "max_abs_error": -1.0, "max_rel_error": 0.0, "limit": 1.0})


def _negative_error_of_vectors(content: Any) -> None:
    none = {"max_abs_error": 0.0, "max_rel_error": 0.0, "limit": 1.0}
    vectors = {"cases": [], "longest": 1, "cut": False, "difference": {"output": "embed", **none, "limit": -1.0}}
    content["parity"] = {"cases": [], "longest": 1, "outputs": [], "versions": {}, "vectors": vectors}


def _many_shards(content: Any) -> None:
    block = content["shards"][2]
    content["shards"][3:3] = [{**block, "name": f"block.{k}"} for k in range(20_000)]


def _list_draft(content: Any) -> None:
    content["files"].append({**content["files"][0], "path": "draft/pipeload.json"})
    content["draft"] = {"path": "draft", "nbytes": 1000, "top1": 0.5}


_TERM = ("structures", "block", "activations", 0, 0)

_FAULTS = [
    (_many_shards, "it lists 20008 shards, and a model has at most 4096"),
    (_double_tensor, "of shard 'block.001', tensor '.*' occurs twice"),
    (_overlap, "tensors '.*' and '.*' of shard 'block.001' overlap"),
    (_set("inputs", 0, "shape", to=["batch_size", "9" * 5000]), "'input_ids' has no valid shape"),
    (_set("inputs", 0, "shape", to=["batch_size", str(2**63)]), "'input_ids' has no valid shape"),
    (_set("inputs", 0, "shape", to=["batch_size", 2**63]), "'input_ids' has no valid shape"),
    (_set("inputs", 0, "shape", to=["batch_size", " + ".join(["sequence_length"] * 17)]), "'input_ids' has no valid"),
    (_set("inputs", 0, "shape", to=["batch_size"] * 300_000), "'input_ids' has 300000 dimensions, and a tensor has at"),
    (_set(*_TERM, "dims", to=["batch_size"] * 300_000), "a term of more than 16 dim"),
    (_set(*_TERM, "nbytes", to=2**63), "a number of bytes above 9223372036854775807"),
    (_set("structures", "block", "activations", to=[[]] * 20_000), "and a structure has at most 10000"),
    (lambda m: m["dims"].extend(f"d{k}" for k in range(300)), "symbolic dimensions, and a model has at most 256"),
    (_set("dims", 0, to="a + b"), "dimension 'a . b' has no valid name"),
    (lambda m: m["dims"].append(m["dims"][0]), "dimension '.*' occurs twice"),
    (_set("shards", 2, "tensors", 0, "shape", to=[64] + [1] * 16), "no valid dtype and shape"),
    (_set("shards", 2, "tensors", 0, "shape", to=[0, 2**62, 2**62]), "no valid dtype and shape"),
    (_set("shards", 2, "tensors", 0, "offset", to=2**63), "no valid dtype and shape"),
    (_set("files", 0, "nbytes", to=2**63), "no valid size and sha256"),
    (_list_draft, "it has a draft, and no caches"),
    (_set("files", 0, "path", to="x" * 4097), "the path of file 'x*.*' has 4097 characters"),
    (_set("files", 0, "path", to="./shards//x"), "'./shards//x' is another way to write 'shards/x'"),
    (_set("shards", 2, "outputs", to=["hidden.1"]), "tensor 'hidden.1' occurs twice"),
    (_set("shards", 2, "outputs", to=["elsewhere"]), "makes 'elsewhere', which is no edge and no output of the model"),
    (lambda m: m["edges"].append(m["edges"][0]), "edge '.*' occurs twice"),
    (_set("outputs", to=[]), "'last_hidden_state', which is no edge and no output"),
    (_negative_error, "the verification of output 'x' has an error or limit that is no number"),
    (_negative_error_of_vectors, "the verification of output 'embed' has an error or limit that is no number"),
]


@pytest.mark.parametrize(("change", "words"), _FAULTS, ids=[words[:50] for _, words in _FAULTS])
def test_what_could_not_be_used_is_a_fault(toy_copy: Path, change: Change, words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        manifests.read(_edit(toy_copy, change))
    assert len(str(caught.value)) < 21 * 450


def _without_slice(content: Any) -> None:
    content["head"]["shards"].pop()


def _without_slice_shard(content: Any) -> None:
    del content["shards"][-1]
    content["head"]["shards"].pop()


def _twice(content: Any) -> None:
    content["caches"].append(content["caches"][0])


def _draft(**fields: Any) -> Change:
    def change(content: Any) -> None:
        _list_draft(content)
        content["draft"] |= fields

    return change


def _flat_cache(content: Any) -> None:
    cache = content["caches"][0]
    cache["in_place"] = True
    for spec in (*content["inputs"], *content["outputs"]):
        if spec["name"] in (cache["input"], cache["output"]):
            spec["shape"] = spec["shape"][:3]


_DECODER_FAULTS = [
    (_draft(path="elsewhere"), "the manifest of the draft in 'elsewhere' is not in the list of files"),
    (_draft(nbytes=-1), "the draft has -1 bytes, and 0.5 of its first choices are right"),
    (_draft(nbytes=2**63), "the draft has 9223372036854775808 bytes"),
    (_draft(top1=1.01), "the draft has 1000 bytes, and 1.01 of its first choices are right"),
    (_draft(top1=-0.01), "and -0.01 of its first choices are right"),
    (_flat_cache, "cache '.*' is written in place and has 3 dimensions, not 4"),
    (_without_slice, "the head consists of .* and the slices among the shards are"),
    (_without_slice_shard, r"the slices of the head make \d+ values of 'logits', which has 96"),
    (lambda m: m["head"]["shards"].reverse(), "the head consists of"),
    (_set("head", to=None), "is a slice of a head, and the model has none"),
    (_set("outputs", 0, "shape", -1, to="sequence_length"), "the slices of the head make"),
    (_set("outputs", 0, "shape", to=[96]), "do not have the shape of 'logits'"),
    (lambda m: m["outputs"].pop(), "which is no edge and no output of the model"),
    (_twice, "cache input '.*' occurs twice"),
]


@pytest.mark.parametrize(("change", "words"), _DECODER_FAULTS, ids=[words[:50] for _, words in _DECODER_FAULTS])
def test_a_head_and_outputs_are_whole(toy_decoder: Path, tmp_path: Path, change: Change, words: str) -> None:
    directory = Path(shutil.copytree(toy_decoder, tmp_path / "model"))
    with pytest.raises(ManifestError, match=words):
        manifests.read(_edit(directory, change))


@pytest.mark.parametrize("top1", [None, 0.0, 1.0])
def test_a_draft_is_listed_and_in_the_directory_of_a_decoder(
    toy_decoder: Path, tmp_path: Path, top1: float | None
) -> None:
    directory = Path(shutil.copytree(toy_decoder, tmp_path / "model"))
    draft = manifests.read(_edit(directory, _draft(top1=top1))).draft
    assert draft is not None
    assert (draft.path, draft.nbytes, draft.top1) == ("draft", 1000, top1)


def test_a_message_lists_twenty_faults_at_most(toy_copy: Path) -> None:
    def change(content: Any) -> None:
        for record in content["files"] * 100:
            content["files"].append({**record, "nbytes": -1})

    with pytest.raises(ManifestError, match=r"has more than 20 faults: .*Export the model again") as caught:
        manifests.read(_edit(toy_copy, change))
    assert str(caught.value).count("; ") == 19


def test_a_name_of_a_million_characters_is_cut_in_the_message(toy_copy: Path) -> None:
    with pytest.raises(ManifestError, match=r"takes 'xxx.*xxx', which nothing before it makes") as caught:
        manifests.read(_edit(toy_copy, _set("shards", 2, "inputs", 0, to="x" * 1_000_000)))
    assert len(str(caught.value)) < 1000


def test_a_model_of_thousands_of_shards_is_refused_before_any_of_them_is_planned(toy_copy: Path) -> None:
    with pytest.raises(ManifestError, match="20008 shards"):
        pipeload.load(_edit(toy_copy, _many_shards), "8GB")


@pytest.mark.parametrize("name", ["toy", "toy-uneven", "toy-decoder", "toy-large"])
def test_what_was_exported_has_no_fault(made_toys: Callable[[str], Path], name: str) -> None:
    assert manifests.read(made_toys(name)).shards
