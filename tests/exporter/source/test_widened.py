"""Weights of 16 bits become float32 files that are mapped: models larger than memory are traced and asked with them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.exporter.models import write_gpt2
from tests.marks import slow
from tests.models import traced_here

from pipeload_export import export
from pipeload_export.source import sources, tracing, widened
from pipeload_export.source.sources import Checkpoint, find_source
from pipeload_export.source.widened import widen


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sources, tracing):
        monkeypatch.setattr(module, "MAPPED_FROM_BYTES", 0)


def _tensors() -> dict[str, Any]:
    import torch

    made = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, 5, generator=made).to(torch.float16),
        "brain": torch.randn(7, generator=made).to(torch.bfloat16),
        "full": torch.randn(2, 2, generator=made),
        "ids": torch.arange(3),
        "scalar": torch.tensor(0.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
    }


def test_each_value_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(widened, "_PIECE_BYTES", 8)
    (tmp_path / "view").mkdir()
    files = {"a.safetensors": _tensors(), "b.safetensors": {"full": torch.ones(2)}}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name, {"format": "pt"})
        (tmp_path / "view" / name).symlink_to(tmp_path / name)
    before = (tmp_path / "a.safetensors").read_bytes()
    widen(tmp_path / "view")
    for name, tensors in files.items():
        found = load_file(tmp_path / "view" / name)
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[key].dtype == (torch.float32 if tensor.is_floating_point() else tensor.dtype)
            assert torch.equal(found[key], tensor.to(found[key].dtype))
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert (tmp_path / "view" / "b.safetensors").is_symlink()
    assert sorted(path.name for path in (tmp_path / "view").iterdir()) == sorted(files)


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_16_bits_exports_as_it_would_in_memory(tmp_path: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_gpt2(tmp_path / "model"), dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "checkpoint")
    found = find_source(str(tmp_path / "checkpoint"), progress=lambda *_: None)
    assert isinstance(found, Checkpoint)
    assert found.request.mapped
    assert (found.request.widened_bytes > 0) == (dtype == "bfloat16")
    with traced_here():
        manifest = export(tmp_path / "checkpoint", tmp_path / "out")
    assert manifest.parity is not None
    shutil.rmtree(tmp_path / "model")
    model.float().save_pretrained(tmp_path / "model")
    with traced_here():
        other = export(tmp_path / "model", tmp_path / "other")
    assert [shard.weights for shard in manifest.shards] == [shard.weights for shard in other.shards]


_PROGRAM = """
import re, sys, numpy as np, torch, transformers
from pathlib import Path
from pipeload_export.source.older_form import view_of
from pipeload_export.source.widened import widen

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

view = view_of(Path(sys.argv[1]), Path(sys.argv[2]))
if sys.argv[3] == "widened":
    widen(view)
before = held()
model = transformers.AutoModelForCausalLM.from_pretrained(view, dtype=torch.float32, use_safetensors=True)
with torch.no_grad():
    model(torch.zeros(1, 4, dtype=torch.long))
print(held() - before)
"""


@slow
def test_mapped_weights_take_no_memory_of_their_own(tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=1024, n_head=8, vocab_size=4000))
    nbytes = 4 * sum(weight.numel() for weight in model.parameters())
    model.to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    held = {}
    for way in ("plain", "widened"):
        command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "checkpoint"), str(tmp_path / way), way]
        held[way] = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert held["plain"] > nbytes
    assert held["widened"] < nbytes / 2
