"""Tiny seeded models as sharded directories, for tests: every family's real architecture, with weights of some 100 kB.

    python -m tests.models                    all of them, in a cache that every test run shares; prints the folder
    python -m tests.models OUT bert gpt2      some of them

Each directory of an architecture also holds `reference.npz`: inputs, and the unsplit model's answers to them, as
`input.0.input_ids`, `output.0.last_hidden_state`, `input.1.input_ids` ... Those of models for text generation also hold
`greedy.npz`: the texts of transformers itself, as `tests/greedy.py` has it, and the folder `int8`: the same model
with KV caches of int8. Directories named `toy...` are those of `tests/engine/toy.py`. Tests find the folder in the
environment variable PIPELOAD_TEST_MODELS; a machine without torch gets it from one that has it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from tests.greedy import GREEDY_NAME, write_continuations
from tests.shared import made_by_one

if TYPE_CHECKING:
    from pipeload_export.source.asking import Questions
    from pipeload_export.source.tracing import Request

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE_NAME = "reference.npz"
INT8_NAME = "int8"
_VOCABULARY = 1000
_SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
_IMAGE = {"image_size": 32, "patch_size": 8}
_GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": _VOCABULARY, "n_positions": 128}

# name -> (task, class of transformers, class of its config, the config's arguments)
ARCHITECTURES: Mapping[str, tuple[str, str, str, Mapping[str, Any]]] = {
    "bert": ("feature-extraction", "BertModel", "BertConfig", {**_SMALL, "vocab_size": _VOCABULARY}),
    "bert-qa": ("question-answering", "BertForQuestionAnswering", "BertConfig", {**_SMALL, "vocab_size": _VOCABULARY}),
    "bert-score": (
        "text-classification",
        "BertForSequenceClassification",
        "BertConfig",
        {**_SMALL, "vocab_size": _VOCABULARY, "num_labels": 1},
    ),
    "bert-mlm": ("fill-mask", "BertForMaskedLM", "BertConfig", {**_SMALL, "vocab_size": _VOCABULARY}),
    "roberta": (
        "text-classification",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_SMALL, "vocab_size": _VOCABULARY},
    ),
    "distilbert": (
        "token-classification",
        "DistilBertForTokenClassification",
        "DistilBertConfig",
        {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": _VOCABULARY},
    ),
    "vit": ("image-classification", "ViTForImageClassification", "ViTConfig", {**_SMALL, **_IMAGE}),
    "deit": ("image-classification", "DeiTForImageClassification", "DeiTConfig", {**_SMALL, **_IMAGE}),
    "gpt-neo": (
        "text-generation",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 16,
            "vocab_size": _VOCABULARY,
            "max_position_embeddings": 128,
        },
    ),
    "gpt-j": ("text-generation", "GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "gpt2": ("text-generation", "GPT2LMHeadModel", "GPT2Config", _GPT),
    "llama": (
        "text-generation",
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_SMALL, "num_key_value_heads": 2, "vocab_size": _VOCABULARY, "tie_word_embeddings": True},
    ),
}
TOYS: Mapping[str, Mapping[str, Any]] = {
    "toy": {"blocks": 6, "width": 64},
    "toy-uneven": {"blocks": 6, "width": 72, "gain": True},
    "toy-other": {"blocks": 6, "width": 64, "seed": 1},
    "toy-decoder": {"blocks": 4, "width": 64, "decoder": True},
    "toy-large": {"blocks": 8, "width": 1024},
    "toy-narrow": {"blocks": 6, "width": 96, "gain": True, "narrow": True},
    "toy-narrow-decoder": {"blocks": 4, "width": 64, "decoder": True, "narrow": True},
    "toy-small": {"blocks": 6, "width": 64, "small": True},
    "toy-common": {"blocks": 6, "width": 64, "common": True},
    "toy-large-common": {"blocks": 8, "width": 1024, "common": True},
}
SIBLINGS = frozenset({"bert-mlm", "bert-qa", "bert-score", "deit", "distilbert", "gpt-j", "gpt-neo", "roberta"})
"""Architectures that differ little from one that is tested beside them: BERT, ViT, GPT-2 and Llama."""

_SIZES = ((1, 1), (1, 7), (2, 12))
"""Batch and length of the reference inputs."""


def make(out: Path, name: str) -> Path:
    """Write one model into a folder; files that are there already stay. Returns the model's directory."""

    def write(directory: Path) -> None:
        if name in TOYS:
            from tests.engine.toy import make_toy

            make_toy(directory, **TOYS[name])
        else:
            _make_architecture(directory, name)

    return made_by_one(out / name, write)


def made_once(*names: str) -> Path:
    """The folder of the cache with the named models, or with all, as the exporter of this tree makes them.

    In a process of its own: torch would stay in this one, and in its memory. One process makes all that the fast
    tests need, since it imports torch once for all of them; siblings are made when a slow test asks for one.
    """
    digest = hashlib.sha256()
    tests = REPOSITORY / "tests"
    sources = [
        *REPOSITORY.glob("exporter/**/*.py"),
        tests / "models.py",
        tests / "greedy.py",
        tests / "engine" / "toy.py",
    ]
    contract = REPOSITORY / "engine" / "pipeload" / "format"
    for path in sorted([*sources, *contract.glob("*.py")]):
        digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"pipeload-test-models-{os.getuid()}-{digest.hexdigest()[:16]}"
    wanted = dict.fromkeys(names or [*ARCHITECTURES, *TOYS])
    if not SIBLINGS.issuperset(wanted):
        wanted |= dict.fromkeys(name for name in ARCHITECTURES if name not in SIBLINGS)
    if missing := [name for name in wanted if not (cache / name).exists()]:
        roots = os.pathsep.join(str(REPOSITORY / name) for name in ("engine", "exporter"))
        subprocess.run(
            [sys.executable, "-m", "tests.models", str(cache), *missing],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": roots},
            check=True,
            timeout=600,
            stdout=subprocess.DEVNULL,
        )
    return cache


def seeded(model_class: str, config_class: str, options: Mapping[str, Any], seed: int = 0) -> Any:
    """A model of transformers with random weights, from the names of its classes and its config's arguments."""
    import torch
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()


def _make_architecture(directory: Path, name: str) -> None:
    from pipeload_export import export

    task, model_class, config_class, options = ARCHITECTURES[name]
    model = seeded(model_class, config_class, options, sum(name.encode()))
    with tempfile.TemporaryDirectory(prefix="pipeload-models-") as folder:
        checkpoint, unsplit = Path(folder) / "checkpoint", Path(folder) / "unsplit"
        model.save_pretrained(checkpoint)
        with traced_here():
            export(checkpoint, directory, task=task, keep_onnx=unsplit)
        np.savez(directory / REFERENCE_NAME, **_reference(unsplit / "model.onnx", task))
        if task == "text-generation":
            write_continuations(model, directory / GREEDY_NAME)
            export(unsplit / "model.onnx", directory / INT8_NAME, task=task, kv_cache="int8")


@contextmanager
def traced_here() -> Iterator[None]:
    """Do in this process what the exporter does in children, which would import torch and transformers again."""
    from pipeload.errors import ExportError
    from pipeload_export.source import asking, beside, reference, sentences, sources, tracer, tracing
    from pipeload_export.source.refused import Refused

    def export_checkpoint(request: Request, folder: Path, progress: object, **_: object) -> Path:
        folder.mkdir(parents=True)
        with warnings.catch_warnings():
            try:
                tracer._export(request, folder)
            except Refused as refusal:
                raise ExportError(f"{request.name} cannot be exported to ONNX: {refusal}") from refusal
        return tracing.only_graph(folder, request.name)

    def put_questions(questions: Questions, folder: Path, *_: object) -> None:
        with warnings.catch_warnings():
            reference.answer(questions, folder)

    def in_child(work: Callable[[Any, Path], None]) -> Callable[..., str | None]:
        def run(_: str, request: Any, folder: Path, **__: object) -> str | None:
            with warnings.catch_warnings():
                try:
                    work(request, folder)
                except Refused as refusal:
                    return str(refusal)
            return None

        return run

    with (
        mock.patch.object(sources, "export_checkpoint", export_checkpoint),
        mock.patch.object(beside, "run_child", in_child(beside._resolve)),
        mock.patch.object(sentences, "run_child", in_child(sentences._answer)),
        mock.patch.object(asking, "put_questions", put_questions),
    ):
        yield


def _reference(path: Path, task: str) -> dict[str, NDArray[Any]]:
    """Seeded inputs and the answers that plain onnxruntime gets from the unsplit graph, without optimisation."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found: dict[str, NDArray[Any]] = {}
    for number, inputs in enumerate(_inputs(session.get_inputs(), task)):
        for name, array in inputs.items():
            found[f"input.{number}.{name}"] = array
        for name, array in zip(names, session.run(names, inputs), strict=True):
            found[f"output.{number}.{name}"] = array
    return found


def _inputs(specs: list[Any], task: str) -> Iterator[dict[str, NDArray[Any]]]:
    random = np.random.default_rng(0)
    for batch, length in _SIZES:
        pasts = (0, 5) if task == "text-generation" else (0,)
        for past in pasts:
            yield {spec.name: _input(spec, batch, length, past, random) for spec in specs}


def _input(spec: Any, batch: int, length: int, past: int, random: np.random.Generator) -> NDArray[Any]:
    if spec.name == "pixel_values":
        return random.standard_normal((batch, 3, _IMAGE["image_size"], _IMAGE["image_size"]), dtype=np.float32)
    if spec.name == "input_ids":
        return random.integers(0, _VOCABULARY, (batch, length))
    if spec.name == "position_ids":
        return np.tile(np.arange(past, past + length), (batch, 1))
    if spec.name == "token_type_ids":
        return np.zeros((batch, length), np.int64)
    if spec.name == "attention_mask":
        return np.ones((batch, past + length), np.int64)
    assert spec.name.startswith("past_key_values."), f"no recipe for the input {spec.name}"
    _, heads, _, size = spec.shape
    return random.standard_normal((batch, heads, past, size), dtype=np.float32)


def main(say: Callable[[str], None] = print) -> int:
    """Parse the command line and make the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="where; default: the cache, with all of them")
    parser.add_argument("names", nargs="*", help=f"of {' '.join([*ARCHITECTURES, *TOYS])}; default: all")
    arguments = parser.parse_args()
    if arguments.out is None:
        say(str(made_once()))
        return 0
    for name in arguments.names or [*ARCHITECTURES, *TOYS]:
        say(str(make(arguments.out, name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
