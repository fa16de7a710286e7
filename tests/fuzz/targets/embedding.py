"""The modules that make vectors of tokens, with a model of a few lines of numpy before them."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tests.engine.tasks.fakes import ToyRunner, write_bert_tokenizer
from tests.engine.tasks.fakes import manifest as text_manifest
from tests.fuzz.mutations import json_bytes, json_of
from tests.fuzz.target import Target, Trial, Wrong
from tests.fuzz.targets.settings import InMemory

from pipeload.tasks.embed.embed import embed

_WIDTH = 4
_PACKAGE = "sentence_transformers.models."
_FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{_PACKAGE}Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{_PACKAGE}Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{_PACKAGE}Dense"},
        {"idx": 3, "name": "3", "path": "3_LayerNorm", "type": f"{_PACKAGE}LayerNorm"},
        {"idx": 4, "name": "4", "path": "4_Normalize", "type": f"{_PACKAGE}Normalize"},
    ],
    "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode": "cls"},
    "2_Dense/config.json": {"activation_function": "torch.nn.modules.activation.Tanh", "use_residual": False},
    "2_Dense/model.safetensors": {
        "linear.weight": {"dtype": "F32", "shape": [_WIDTH, _WIDTH], "data_offsets": [0, 64]},
        "linear.bias": {"dtype": "BF16", "shape": [_WIDTH], "data_offsets": [64, 72]},
    },
    "3_LayerNorm/config.json": {"dimension": _WIDTH},
    "3_LayerNorm/model.safetensors": {
        "norm.weight": {"dtype": "F32", "shape": [_WIDTH], "data_offsets": [0, 16]},
        "norm.bias": {"dtype": "F16", "shape": [_WIDTH], "data_offsets": [16, 24]},
    },
    "config_sentence_transformers.json": {"prompts": {"query": "the cat "}, "default_prompt_name": "query"},
    "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": True},
}
_DATA = bytes(range(1, 64)) * 8


def _seeds() -> list[bytes]:
    plain = {name: _FILES[name] for name in ("modules.json", "1_Pooling/config.json")}
    plain["modules.json"] = _FILES["modules.json"][:2]
    residual = {**_FILES, "2_Dense/config.json": {**_FILES["2_Dense/config.json"], "use_residual": True}}
    return [json.dumps(one).encode() for one in (_FILES, plain, residual)]


def _content(name: str, value: Any) -> bytes:
    header = json_bytes(value)
    return len(header).to_bytes(8, "little") + header + _DATA if name.endswith(".safetensors") else header


class _Runner(ToyRunner):
    """A model whose files are an input."""

    given: InMemory

    @property
    def files(self) -> InMemory:
        return self.given


def _tokens(inputs: Mapping[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"]
    return {"last_hidden_state": np.sin(ids[..., None] * np.arange(1, _WIDTH + 1)).astype(np.float32)}


def _prepare() -> Trial:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        write_bert_tokenizer(Path(folder))
        own = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    shape = ("batch_size", "sequence_length", _WIDTH)
    manifest = text_manifest("feature-extraction", outputs={"last_hidden_state": shape})

    def trial(data: bytes) -> bool:
        try:
            given = json.loads(data)
        except (ValueError, RecursionError):
            return False
        files = {name: _content(name, value) for name, value in given.items()} if isinstance(given, dict) else {}
        runner = _Runner(Path("/fuzz"), manifest, _tokens)
        runner.given = InMemory({**files, **own}, manifest)
        found = embed(runner, ["the cat", "a dog sat on the mat"])
        if found.dtype != np.float32 or found.ndim != 2 or len(found) != 2 or not found.shape[1]:
            raise Wrong("texts become no vectors", f"{found.dtype} {found.shape}")
        return True

    return trial


TARGETS = (
    Target(
        name="embedding",
        what="modules of embeddings",
        prepare=_prepare,
        mutate=json_of,
        seeds=_seeds,
        share=0.5,
    ),
)
