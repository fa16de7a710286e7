"""The kinds of SOURCE, refused ones with their messages, and that a checkpoint becomes the right graph."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from tests.exporter.models import write_bert, write_gguf, write_gpt2, write_json, write_onnx
from tests.models import traced_here

from pipeload.errors import ConfigError, ExportError
from pipeload_export import extra
from pipeload_export.source import tracing
from pipeload_export.source.folder import side_files
from pipeload_export.source.sources import Checkpoint, Unsplit, find_source
from pipeload_export.source.task import TASKS, task_of_config, task_of_graph


def silent(what: str, done: int, total: int) -> None:
    pass


def find(source: str | Path, **options: object) -> Checkpoint | Unsplit:
    return find_source(str(source), progress=silent, **options)  # type: ignore[arg-type]


def safetensors_file(path: Path, *, nbytes: int = 64) -> Path:
    header = json.dumps({"w": {"dtype": "F16", "shape": [nbytes // 2], "data_offsets": [0, nbytes]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    return path


class TestOnnxFile:
    def test_is_used_where_it_lies_with_the_files_beside_it(self, tmp_path: Path) -> None:
        path = write_onnx(tmp_path / "m.onnx", external=True)
        write_json(tmp_path / "config.json", {"model_type": "bert"})
        write_json(tmp_path / "1_Pooling" / "config.json", {})
        (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "../../etc"}]')
        found = find(path)
        assert isinstance(found, Unsplit)
        assert found.path == path
        assert found.files == (path, tmp_path / "m.onnx_data")
        assert found.nbytes == path.stat().st_size + (tmp_path / "m.onnx_data").stat().st_size
        assert set(found.side_files) == {"config.json", "modules.json", "1_Pooling/config.json"}
        assert (found.model_type, found.task) == ("bert", "feature-extraction")

    def test_brings_the_weights_of_the_modules_behind_the_model(self, tmp_path: Path) -> None:
        names = ("0_Transformer", "1_Pooling", "2_Dense")
        for name in names:
            write_json(tmp_path / name / "config.json", {})
            safetensors_file(tmp_path / name / "model.safetensors")
        modules = [{"path": name, "type": f"sentence_transformers.models.{name[2:]}"} for name in names]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        found = {name for name in side_files(tmp_path) if name.endswith(".safetensors")}
        assert found == {"1_Pooling/model.safetensors", "2_Dense/model.safetensors"}

    def test_needs_no_config(self, tmp_path: Path) -> None:
        found = find(write_onnx(tmp_path / "m.onnx"), task="fill-mask")
        assert isinstance(found, Unsplit)
        assert (found.model_type, found.task, dict(found.side_files)) == ("unknown", "fill-mask", {})

    def test_external_data_must_be_there_whole_and_inside(self, tmp_path: Path) -> None:
        path = write_onnx(tmp_path / "a" / "m.onnx", external=True)
        data = tmp_path / "a" / "m.onnx_data"
        content = data.read_bytes()
        data.write_bytes(content[:-1])
        with pytest.raises(ExportError, match=f"m.onnx_data', which has {len(content) - 1} of {len(content)} bytes"):
            find(path)
        data.rename(tmp_path / "moved")
        with pytest.raises(ExportError, match=r"'m\.onnx_data', which is missing"):
            find(path)
        data.symlink_to(tmp_path / "moved")
        with pytest.raises(ExportError, match="outside of its own folder"):
            find(path)

    @pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"no protobuf"])
    def test_damaged(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        with pytest.raises(ExportError, match="no ONNX file"):
            find(path)

    @pytest.mark.parametrize("opset", [0, 6, 21, 999])
    def test_opsets_that_no_graph_can_have_are_refused_at_once(self, tmp_path: Path, opset: int) -> None:
        constants = pytest.importorskip("torch.onnx._constants")
        lowest, highest = constants.ONNX_MIN_OPSET, constants.ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET
        with pytest.raises(ConfigError, match=f"opset {opset}, only with one from {lowest} to {highest}.*--opset out"):
            find(tmp_path, opset=opset)

    def test_has_an_opset_and_a_revision_of_its_own(self, tmp_path: Path) -> None:
        path = write_onnx(tmp_path / "m.onnx")
        with pytest.raises(ConfigError, match="opset of its own"):
            find(path, opset=17)
        with pytest.raises(ConfigError, match="--revision"):
            find(path, revision="main")


class TestTask:
    @pytest.mark.parametrize(
        ("architecture", "task"),
        [
            ("BertModel", "feature-extraction"),
            ("BertForPreTraining", "fill-mask"),
            ("RobertaForMaskedLM", "fill-mask"),
            ("DistilBertForSequenceClassification", "text-classification"),
            ("BertForTokenClassification", "token-classification"),
            ("BertForQuestionAnswering", "question-answering"),
            ("ViTForImageClassification", "image-classification"),
            ("DeiTForImageClassificationWithTeacher", "image-classification"),
            ("GPT2LMHeadModel", "text-generation"),
            ("LlamaForCausalLM", "text-generation"),
            ("T5ForConditionalGeneration", None),
        ],
    )
    def test_of_a_config(self, architecture: str, task: str | None) -> None:
        assert task_of_config({"architectures": [architecture]}) == task

    @pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": [1]}, {"architectures": "x"}])
    def test_of_a_config_that_does_not_tell(self, config: dict[str, object]) -> None:
        assert task_of_config(config) is None

    @pytest.mark.parametrize(
        ("inputs", "outputs", "config", "task"),
        [
            ("input_ids", {"last_hidden_state": 3}, {"architectures": ["BertForMaskedLM"]}, "feature-extraction"),
            ("input_ids", {"start_logits": 2, "end_logits": 2}, {}, "question-answering"),
            ("past_key_values.0.key", {"logits": 3}, {}, "text-generation"),
            ("pixel_values", {"logits": 2}, {}, "image-classification"),
            ("input_ids", {"logits": 2}, {}, "text-classification"),
            ("input_ids", {"logits": 2}, {"architectures": ["BertModel"]}, "text-classification"),
            ("input_ids", {"logits": 3}, {}, "token-classification"),
            ("input_ids", {"logits": 3}, {"vocab_size": 100}, "fill-mask"),
            ("input_ids", {"logits": 3}, {"architectures": ["BertForMaskedLM"]}, "fill-mask"),
            # The decoder of a T5 was one that labels tokens, or fills masks.
            ("encoder_hidden_states", {"logits": 3}, {}, "feature-extraction"),
            ("decoder_input_ids", {"logits": 3}, {"vocab_size": 100}, "feature-extraction"),
            ("decoder_input_ids", {"logits": 2}, {}, "text-classification"),
        ],
    )
    def test_of_a_graph(self, inputs: str, outputs: dict[str, int], config: dict[str, object], task: str) -> None:
        shapes = {name: [*["batch_size", "sequence_length"][: rank - 1], 100] for name, rank in outputs.items()}
        assert task_of_graph([inputs], shapes, config) == task

    def test_unknown_lists_the_known(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"'translation' is no task.*{', '.join(TASKS)}"):
            find(tmp_path, task="translation")


class TestFolder:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["pytorch_model.bin", "training_args.bin"], "only as pytorch_model.bin.*run code"),
            (["model.ckpt"], "only as model.ckpt"),
            (["a.gguf", "b.gguf"], "several GGUF files: a.gguf, b.gguf"),
            (["model.onnx"], "Pass the path of the .onnx file"),
            (["config.json"], "holds no weights"),
            ([], "holds no weights"),
        ],
    )
    def test_without_weights_that_are_safe(self, tmp_path: Path, names: list[str], message: str) -> None:
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=message):
            find(tmp_path)

    def test_tells_size_and_task_before_anything_is_loaded(self, tmp_path: Path) -> None:
        safetensors_file(tmp_path / "model.safetensors", nbytes=64)
        write_json(tmp_path / "config.json", {"architectures": ["BertModel"]})
        found = find(tmp_path)
        assert isinstance(found, Checkpoint)
        assert found.request.weight_bytes == 128, "the 16-bit weights are widened"
        assert found.request.task == "feature-extraction"
        assert set(found.side_files) == {"config.json"}

    def test_truncated_weights(self, tmp_path: Path) -> None:
        path = safetensors_file(tmp_path / "model.safetensors")
        write_json(tmp_path / "config.json", {"architectures": ["BertModel"]})
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ExportError, match="where its header says"):
            find(tmp_path)
        path.write_bytes(b"\x10\0\0\0\0\0\0\0no json")
        with pytest.raises(ExportError, match="no safetensors file"):
            find(tmp_path)

    def test_a_part_is_missing(self, tmp_path: Path) -> None:
        write_json(tmp_path / "config.json", {"architectures": ["BertModel"]})
        parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        write_json(tmp_path / "model.safetensors.index.json", {"weight_map": dict(zip("ab", parts, strict=True))})
        safetensors_file(tmp_path / parts[0])
        with pytest.raises(ExportError, match=f"lacks {parts[1]}"):
            find(tmp_path)
        safetensors_file(tmp_path / parts[1])
        found = find(tmp_path)
        assert isinstance(found, Checkpoint)
        assert found.request.weight_bytes == 256

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({}, "has no config.json"),
            ({"architectures": ["T5ForConditionalGeneration"]}, "does not say what it is for.*--task"),
            ({"quantization_config": {"quant_method": "gptq"}}, "is quantised \\(gptq\\)"),
        ],
    )
    def test_config_that_cannot_be_exported(self, tmp_path: Path, config: dict[str, object], message: str) -> None:
        safetensors_file(tmp_path / "model.safetensors")
        if config:
            write_json(tmp_path / "config.json", config)
        with pytest.raises(ConfigError, match=message):
            find(tmp_path)

    def test_damaged_config_and_gguf(self, tmp_path: Path) -> None:
        safetensors_file(tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ExportError, match=r"config\.json is no JSON"):
            find(tmp_path)
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ExportError, match="no GGUF file"):
            find(tmp_path / "m.gguf")

    @pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "a/b/c", "nowhere/model.onnx", "m.gguf", "", "a b"])
    def test_no_such_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=r"does not exist|holds no weights"):
            find(source)

    def test_without_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        safetensors_file(tmp_path / "model.safetensors")
        monkeypatch.setattr(extra, "find_spec", lambda name: None if name in ("torch", "transformers") else object())
        with pytest.raises(ExportError, match=r"needs torch, transformers, .*pip install '\.\[export\]' in"):
            find(tmp_path)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


class TestCheckpoint:
    @pytest.mark.slow
    def test_becomes_a_graph_that_answers_like_torch(
        self, bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        import torch
        from transformers import BertModel

        found, before = find(bert), psutil.Process().children()
        assert isinstance(found, Checkpoint)
        seen: list[tuple[str, int, int]] = []
        unsplit = found.to_onnx(tmp_path, lambda *step: seen.append(step))
        assert (unsplit.model_type, unsplit.task) == ("bert", "feature-extraction")
        ids = np.random.default_rng(0).integers(0, 100, (2, 9))
        mask = np.ones_like(ids)
        mask[1, 5:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (actual,) = onnxruntime.InferenceSession(unsplit.path).run(None, inputs)
        with torch.no_grad():
            answer = BertModel.from_pretrained(bert)(**{name: torch.from_numpy(a) for name, a in inputs.items()})
        np.testing.assert_allclose(actual, answer.last_hidden_state.numpy(), atol=1e-5)
        assert seen[-1] == ("export to ONNX", found.request.weight_bytes, found.request.weight_bytes)
        assert capfd.readouterr() == ("", ""), "the libraries' noise stays in the log"
        assert psutil.Process().children() == before

    def test_decoder_has_caches(self, tmp_path: Path) -> None:
        found = find(write_gpt2(tmp_path / "gpt2"))
        assert isinstance(found, Checkpoint)
        with traced_here():
            unsplit = found.to_onnx(tmp_path, silent)
        inputs = [value.name for value in onnx.load(unsplit.path).graph.input]
        assert [name for name in inputs if "past" in name] == [
            f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")
        ]
        assert {"config.json", "generation_config.json"} <= set(unsplit.side_files)

    def test_gguf_brings_config_and_tokenizer(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "gguf" / "toy.gguf")
        write_json(path.with_name("config.json"), {"model_type": "something else"})
        found = find(path)
        assert isinstance(found, Checkpoint)
        with traced_here():
            unsplit = found.to_onnx(tmp_path, silent)
        assert (unsplit.model_type, unsplit.task) == ("llama", "text-generation")
        assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(unsplit.side_files)
        names = {tensor.name for tensor in onnx.load(unsplit.path).graph.initializer}
        assert any("embed_tokens" in name for name in names)

    @pytest.mark.slow
    def test_refused_by_the_library(self, bert: Path, tmp_path: Path) -> None:
        found = find(bert, task="image-classification")
        assert isinstance(found, Checkpoint)
        with pytest.raises(ExportError, match="does not export models of type 'bert' for image-classification, only"):
            found.to_onnx(tmp_path, silent)

    @pytest.mark.slow
    def test_code_of_the_checkpoint_runs_only_when_asked(
        self, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
        folder = shutil.copytree(bert, tmp_path / "hostile")
        code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import BertConfig as Own"
        (folder / "own.py").write_text(code)
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
        write_json(folder / "config.json", config | {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}})
        found = find(folder)
        assert isinstance(found, Checkpoint)
        with pytest.raises(ExportError, match=r"Python code of its own.*--trust-remote-code"):
            found.to_onnx(tmp_path / "distrusted", silent)
        assert not (tmp_path / "ran").exists()
        found = find(folder, trust_remote_code=True)
        assert isinstance(found, Checkpoint)
        with pytest.raises(ExportError):
            found.to_onnx(tmp_path / "trusted", silent)
        assert (tmp_path / "ran").exists()

    def test_needs_more_memory_than_there_is(self, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracing, "auto_budget_bytes", lambda: 10**6)
        found = find(bert)
        assert isinstance(found, Checkpoint)
        with pytest.raises(ExportError, match=r"takes about .* of memory, and 1\.0 MB are free"):
            found.to_onnx(tmp_path, silent)

    def test_memory_for_the_catalogs_giants(self) -> None:
        assert tracing.needed_memory_bytes(1_557_611_200 * 4) < 24e9
        assert tracing.needed_memory_bytes(6_050_882_784 * 4) > 48e9

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (f"import os; os.kill(os.getpid(), {signal.SIGKILL})", "killed by the system.*memory"),
            ("raise SystemExit('torn')", "exit code 1. Its last words: torn"),
        ],
    )
    def test_child_dies(
        self, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
    ) -> None:
        monkeypatch.setattr(tracing, "_CHILD", code)
        found = find(bert)
        assert isinstance(found, Checkpoint)
        with pytest.raises(ExportError, match=message):
            found.to_onnx(tmp_path, silent)

    def test_interrupt_ends_the_child(self, bert: Path, tmp_path: Path) -> None:
        def interrupt(what: str, done: int, total: int) -> None:
            raise KeyboardInterrupt

        found, before = find(bert), psutil.Process().children()
        assert isinstance(found, Checkpoint)
        with pytest.raises(KeyboardInterrupt):
            found.to_onnx(tmp_path, interrupt)
        assert psutil.Process().children() == before

    @pytest.mark.slow
    def test_child_does_not_outlive_a_killed_parent(self, bert: Path, tmp_path: Path) -> None:
        code = (
            "import os, pathlib, psutil\nfrom pipeload_export.source.sources import find_source\n"
            "def kill(*_):\n    print(psutil.Process().children()[0].pid, flush=True)\n    os.kill(os.getpid(), 9)\n"
            f"find_source({str(bert)!r}, progress=print).to_onnx(pathlib.Path({str(tmp_path)!r}), kill)\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        parent = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=False)
        assert parent.returncode == -signal.SIGKILL
        with suppress(psutil.NoSuchProcess):
            _, alive = psutil.wait_procs([psutil.Process(int(parent.stdout))], timeout=60)
            assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)
        assert not (tmp_path / "result.json").exists()
