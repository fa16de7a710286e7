from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import pytest
from tests.engine.tasks.fakes import Array, ToyDecoder, ToyRunner, manifest, write_bert_tokenizer, write_json
from typer.testing import CliRunner, Result

import pipeload
from pipeload.cli import app
from pipeload.errors import ConfigError
from pipeload.format.manifest import TensorSpec
from pipeload.tasks.classify import classify
from pipeload.tasks.embed import embed
from pipeload.tasks.generate.generate import Generation
from pipeload.tasks.runner import free_inputs
from pipeload.tracing.stats import Stats

pytest.importorskip("tokenizers")


class ToyModel:
    """A runner with what `pipeload.Model` has beside: tasks as methods, statistics, a context."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.plan = SimpleNamespace(
            budget_bytes=256_000_000, loaders=1, buffers=0, resident=frozenset(), resident_bytes=1, streamed_bytes=0
        )
        self.stats = Stats(passes=2, peak_bytes=123_000_000)
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return free_inputs(self.manifest)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.manifest.outputs)

    def embed(self, texts: Any) -> Any:
        return embed.embed(self, texts)

    def classify(self, inputs: Any, *, top_k: int) -> Any:
        return classify.classify(self, inputs, top_k=top_k)

    def __enter__(self) -> ToyModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True


Call = Callable[..., Result]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """How `pipeload.load` was called."""
    return []


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, loads: list[tuple[Any, ...]]) -> Call:
    """Run a command on a toy model; `call(runner, "embed", ...)` puts the directory after the command."""

    def run(runner: Any, command: str, *arguments: str, stdin: str | bytes = "") -> Result:
        model = ToyModel(runner)

        def load(path: Path, memory_budget: str, **options: Any) -> ToyModel:
            loads.append((path, memory_budget, options))
            return model

        monkeypatch.setattr(pipeload, "load", load)
        result = CliRunner().invoke(app, [command, str(runner.directory), *arguments], input=stdin)
        assert model.closed or not loads
        return result

    return run


def _encoder(directory: Path) -> ToyRunner:
    write_bert_tokenizer(directory)
    table = np.random.default_rng(0).standard_normal((30, 12)).astype(np.float32)
    return ToyRunner(
        directory,
        manifest("feature-extraction", outputs={"last_hidden_state": ("batch_size", "sequence_length", 12)}),
        lambda inputs: {"last_hidden_state": table[inputs["input_ids"]]},
    )


def _classifier(directory: Path) -> ToyRunner:
    write_bert_tokenizer(directory)
    write_json(directory, "config.json", {"id2label": {"0": "bad", "1": "good"}})
    return ToyRunner(
        directory,
        manifest("text-classification"),
        lambda inputs: {"logits": np.stack([0 * inputs["input_ids"][:, 1], inputs["input_ids"][:, 1] - 6], 1)},
    )


def test_embed_shows_the_figures_of_one_text(tmp_path: Path, call: Call) -> None:
    result = call(_encoder(tmp_path), "embed", "the cat")
    assert result.exit_code == 0
    assert result.stdout.endswith("...  (12 figures)\n")
    assert len(result.stdout.split()) == 8 + 3
    assert result.stderr == ""


def test_embed_shows_the_similarities_of_several_texts(tmp_path: Path, call: Call) -> None:
    lines = call(_encoder(tmp_path), "embed", "the cat", "dog", "the cat").stdout.splitlines()
    assert [line.split()[0:3:2] for line in lines] == [["1.000", "1.000"], [lines[1].split()[0]] * 2, ["1.000"] * 2]
    assert lines[1].endswith("  dog")


def test_embed_reads_stdin_and_files_and_writes_json_and_npy(tmp_path: Path, call: Call) -> None:
    lines, output = tmp_path / "lines.txt", tmp_path / "out.npy"
    lines.write_text("the dog\n\n  \nsat\n")
    result = call(
        _encoder(tmp_path),
        "embed",
        "-",
        "mat",
        f"--file={lines}",
        "--json",
        f"--output={output}",
        stdin="the cat\ncat\n",
    )
    rows = json.loads(result.stdout)
    assert [row["text"] for row in rows] == ["the cat", "cat", "mat", "the dog", "sat"]
    np.testing.assert_array_equal(np.load(output), np.array([row["embedding"] for row in rows], np.float32))


def test_embed_into_a_file_prints_nothing(tmp_path: Path, call: Call) -> None:
    result = call(_encoder(tmp_path), "embed", "cat", f"--output={tmp_path / 'vectors'}")
    assert (result.exit_code, result.stdout) == (0, "")
    assert np.load(tmp_path / "vectors").shape == (1, 12)


def test_embed_needs_a_text(tmp_path: Path, call: Call) -> None:
    result = call(_encoder(tmp_path), "embed")
    assert result.exit_code == 2
    assert "Give at least one TEXT" in result.stderr


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"\xff", "no UTF-8 text")])
def test_embed_names_a_file_that_is_no_text(tmp_path: Path, call: Call, content: bytes | None, message: str) -> None:
    file = tmp_path / "f"
    if content is not None:
        file.write_bytes(content)
    result = call(_encoder(tmp_path), "embed", f"--file={file}")
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_budget_goes_to_load_and_the_statistics_to_stderr(
    tmp_path: Path, call: Call, loads: list[tuple[Any, ...]]
) -> None:
    result = call(_encoder(tmp_path), "embed", "cat", "--budget", "96MB", "--stats")
    assert loads == [(tmp_path, "96MB", {"progress": None})]
    assert result.stderr.startswith("2 passes, 0 B read, peak 123.0 MB of 256.0 MB\nplan: 1 Loading Agent, 0 buffers")
    call(_encoder(tmp_path), "embed", "cat")
    assert loads[1][1] == "auto"


def test_classify_prints_labels_below_each_text(tmp_path: Path, call: Call) -> None:
    result = call(_classifier(tmp_path), "classify", "the", "sat", "--top-k", "1")
    assert result.stdout == "the\n  0.7311  bad\nsat\n  0.8808  good\n"


def test_classify_reads_lines_and_prints_json(tmp_path: Path, call: Call) -> None:
    result = call(_classifier(tmp_path), "classify", "-", "--json", stdin="the\nsat\n")
    rows = json.loads(result.stdout)
    assert [row["input"] for row in rows] == ["the", "sat"]
    assert [label["label"] for label in rows[1]["labels"]] == ["good", "bad"]
    assert rows[1]["labels"][0]["score"] == pytest.approx(0.8808, abs=1e-4)


def test_classify_without_a_text_is_refused(tmp_path: Path, call: Call) -> None:
    result = call(_classifier(tmp_path), "classify", "-", stdin="\n")
    assert result.exit_code == 2
    assert "stdin has no text" in result.stderr


@pytest.mark.parametrize("command", ["embed", "classify", "generate"])
def test_an_image_file_is_not_taken_for_a_text(tmp_path: Path, call: Call, command: str) -> None:
    (tmp_path / "cat.jpg").touch()
    runner = _classifier(tmp_path) if command == "classify" else _encoder(tmp_path)
    result = call(runner, command, str(tmp_path / "cat.jpg"))
    assert result.exit_code == 2
    assert f"{tmp_path}/cat.jpg is an image file, and " in result.stderr
    assert runner.calls == []


def test_a_text_that_only_looks_like_a_file_is_a_text(tmp_path: Path, call: Call) -> None:
    assert call(_encoder(tmp_path), "embed", "missing.jpg", "x" * 5000 + ".png").exit_code == 0


@pytest.mark.parametrize("command", [("embed",), ("classify", "--top-k=1")])
def test_texts_that_are_cut_are_warned_about_once(tmp_path: Path, call: Call, command: tuple[str, ...]) -> None:
    runner = _classifier(tmp_path) if command[0] == "classify" else _encoder(tmp_path)
    result = call(runner, *command, "-", stdin="the cat sat on the mat " * 4 + "\n" + "the\n" * 600 + "dog " * 90)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: Texts with more than the 16 tokens that the model takes were cut there.")


def test_classify_shows_entities_with_their_place(tmp_path: Path, call: Call) -> None:
    runner = _classifier(tmp_path)
    write_json(tmp_path, "config.json", {"id2label": {"0": "O", "1": "PER"}})
    runner.manifest = manifest("token-classification")
    runner.function = lambda inputs: {"logits": np.eye(2, dtype=np.float32)[(inputs["input_ids"] == 17) * 1] * 9}
    result = call(runner, "classify", "Anna sat")
    assert result.stdout == "Anna sat\n  0.9999  PER  anna  0-4\n"
    facts = json.loads(call(runner, "classify", "Anna sat", "--json").stdout)[0]["labels"]
    assert [(fact["word"], fact["start"], fact["end"]) for fact in facts] == [("anna", 0, 4)]


def test_classify_takes_images_by_path_and_from_stdin(tmp_path: Path, call: Call) -> None:
    images = pytest.importorskip("PIL.Image")
    data = io.BytesIO()
    images.fromarray(np.full((4, 4, 3), 255, np.uint8)).save(data, "png")
    (tmp_path / "white.png").write_bytes(data.getvalue())
    write_json(tmp_path, "config.json", {"image_size": 4})
    runner = ToyRunner(
        tmp_path,
        manifest("image-classification", ("pixel_values",), dtype="float32"),
        lambda inputs: {"logits": inputs["pixel_values"].mean((2, 3))},
    )
    result = call(runner, "classify", str(tmp_path / "white.png"), "-", "--top-k", "1", stdin=data.getvalue())
    assert result.stdout == f"{tmp_path}/white.png\n  0.3333  LABEL_0\n-\n  0.3333  LABEL_0\n"


def test_generate_prints_the_text_and_its_continuation(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    result = call(ToyDecoder(tmp_path, script=[8, 9, 7]), "generate", "the cat", "--max-new-tokens", "3")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "the cat sat on dog\n", "")


def test_generate_prints_json(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    write_json(tmp_path, "config.json", {"eos_token_id": 9})
    result = call(ToyDecoder(tmp_path, script=[8, 9]), "generate", "-", "--json", stdin="the cat\n")
    assert json.loads(result.stdout) == {
        "prompt": "the cat",
        "text": " sat on",
        "token_ids": [8, 9],
        "prompt_tokens": 4,
        "finish_reason": "eos",
        "logprobs": None,
        "sweeps": 2,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
    }


def test_generate_takes_every_option(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def keep(model: Any, prompt: str, **options: Any) -> Generation:
        seen.update(options)
        return Generation(
            text=" sat", token_ids=(8,), prompt_tokens=4, finish_reason="stop", logprobs=(-0.5,), sweeps=1
        )

    monkeypatch.setattr("pipeload.cli.commands.generate.generate_text", keep)
    numbers = ["--max-new-tokens=9", "--min-new-tokens=2", "--top-k=3", "--no-repeat-ngram-size=4", "--seed=5"]
    shares = ["--temperature=0.5", "--top-p=0.9", "--min-p=0.1", "--repetition-penalty=1.2"]
    rest = ["--sample", "--stop=.", "--stop", "the end", "--lookup=6", "--logprobs", "--json"]
    result = call(ToyDecoder(tmp_path), "generate", "the cat", *numbers, *shares, *rest)
    assert json.loads(result.stdout)["logprobs"] == [-0.5]
    assert seen == {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 4,
        "stop_strings": [".", "the end"],
        "seed": 5,
        "prompt_lookup_num_tokens": 6,
        "logprobs": True,
    }
    call(ToyDecoder(tmp_path), "generate", "the cat", "--json", "--greedy")
    assert seen.pop("do_sample") is False
    assert seen.pop("logprobs") is False
    assert set(seen.values()) == {None}


def test_generate_tells_how_many_guesses_were_right(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    result = call(ToyDecoder(tmp_path), "generate", "the the the", "--max-new-tokens=3", "--lookup=2", "--stats")
    assert re.match(r"3 tokens in [23] sweeps; \d of [1-9] guesses were right\n", result.stderr), result.stderr


def test_generate_takes_a_draft_model(tmp_path: Path, call: Call, loads: list[tuple[Any, ...]]) -> None:
    write_bert_tokenizer(tmp_path)
    arguments = ("generate", "the cat", "--max-new-tokens=5", "--budget=1GB")
    alone = call(ToyDecoder(tmp_path), *arguments)
    made = call(ToyDecoder(tmp_path), *arguments, "--draft", str(tmp_path))
    assert (made.exit_code, made.stdout) == (0, alone.stdout)
    assert [load[:2] for load in loads[1:]] == [(tmp_path, "1GB"), (tmp_path, "1GB")]


def test_generate_samples_the_same_text_for_the_same_seed(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    arguments = ("generate", "the cat", "--sample", "--seed=1", "--max-new-tokens=5")
    one = call(ToyDecoder(tmp_path), *arguments)
    assert (one.exit_code, one.stderr) == (0, "")
    assert call(ToyDecoder(tmp_path), *arguments).stdout == one.stdout
    assert call(ToyDecoder(tmp_path), *arguments[:3], "--seed=2", arguments[4]).stdout != one.stdout


def test_generate_ends_after_a_stop_string(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    result = call(ToyDecoder(tmp_path, script=[8, 9, 7]), "generate", "the cat", "--stop", "t on")
    assert result.stdout == "the cat sat on\n"


def test_generate_makes_several_texts(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    arguments = ("generate", "the cat", "--sample", "--seed=1", "--max-new-tokens=4", "--num-return-sequences=3")
    texts = call(ToyDecoder(tmp_path), *arguments).stdout.rstrip("\n").split("\n\n")
    assert len(set(texts)) == 3
    facts = json.loads(call(ToyDecoder(tmp_path), *arguments, "--json").stdout)
    assert [fact["prompt"] + fact["text"] for fact in facts] == texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logprobs"], "--logprobs needs --json."),
        (["--top-p=1.5"], "Invalid value for '--top-p'"),
        (["--max-new-tokens=0"], "Invalid value for '--max-new-tokens'"),
        (["--num-return-sequences=0"], "Invalid value for '--num-return-sequences'"),
    ],
)
def test_generate_refuses_wrong_usage(tmp_path: Path, call: Call, arguments: list[str], message: str) -> None:
    result = call(ToyDecoder(tmp_path), "generate", "the cat", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_generate_without_a_temperature_is_an_error(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    result = call(ToyDecoder(tmp_path), "generate", "the cat", "--sample", "--temperature=0")
    assert isinstance(result.exception, ConfigError)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("stdin", "message"), [(b"", "stdin has no text"), (b" \n", "stdin has no text"), (b"a\xff", "no UTF-8 text")]
)
@pytest.mark.parametrize("command", ["embed", "classify", "generate"])
def test_stdin_without_text_is_refused(tmp_path: Path, call: Call, command: str, stdin: bytes, message: str) -> None:
    result = call(_classifier(tmp_path), command, "-", stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_generate_without_new_text_prints_the_prompt(tmp_path: Path, call: Call) -> None:
    write_bert_tokenizer(tmp_path)
    write_json(tmp_path, "config.json", {"eos_token_id": 3})
    assert call(ToyDecoder(tmp_path, script=[3]), "generate", "the cat").stdout == "the cat\n"


def test_an_error_leaves_stdout_empty(tmp_path: Path, call: Call) -> None:
    result = call(ToyDecoder(tmp_path), "generate", "the cat")
    assert isinstance(result.exception, ConfigError)
    assert result.stdout == ""


def _summing(inputs: dict[str, Array]) -> dict[str, Array]:
    ids = inputs["input_ids"].astype(np.float32)
    return {"logits": ids.sum(1, keepdims=True) * inputs["attention_mask"].sum(), "present": ids}


def _summer(directory: Path) -> ToyRunner:
    return ToyRunner(directory, manifest("fill-mask", ("input_ids", "attention_mask"), cached=False), _summing)  # type: ignore[arg-type]


def test_run_takes_arrays_and_saves_arrays(tmp_path: Path, call: Call) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1, 2]]))
    np.save(tmp_path / "mask.npy", np.array([[1, 0]]))
    given = [f"--input=input_ids={tmp_path}/ids.npy", f"--input=attention_mask={tmp_path}/mask.npy"]
    result = call(_summer(tmp_path), "run", *given, f"--output={tmp_path}/out.npz")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("pass 1: 0.0")
    assert lines[1:] == ["logits: float64[1, 1]  3 .. 3, mean 3"]
    with np.load(tmp_path / "out.npz") as outputs:
        assert {name: outputs[name].tolist() for name in outputs} == {"logits": [[3]], "present": [[1, 2]]}


def test_run_makes_up_inputs_the_same_each_time(tmp_path: Path, call: Call, loads: list[tuple[Any, ...]]) -> None:
    write_json(tmp_path, "config.json", {"vocab_size": 30})
    first, second = _summer(tmp_path), _summer(tmp_path)
    sizes = ["--random", "--size", "sequence_length=5", "--size=batch_size=2"]
    for runner in (first, second):
        facts = json.loads(call(runner, "run", *sizes, "--passes=2", "--json").stdout)
        assert len(facts["seconds"]) == 2
        assert facts["outputs"]["logits"]["shape"] == [2, 1]
    assert loads[0][2] == {"progress": None, "sizes": {"sequence_length": 5, "batch_size": 2}}
    assert len(first.calls) == 2
    for name, array in first.calls[0].items():
        np.testing.assert_array_equal(array, second.calls[0][name])
    assert first.calls[0]["attention_mask"].tolist() == [[1] * 5] * 2
    assert 0 <= first.calls[0]["input_ids"].min() < first.calls[0]["input_ids"].max() < 30


def test_run_makes_up_what_is_not_given(tmp_path: Path, call: Call) -> None:
    np.save(tmp_path / "mask.npy", np.array([[1, 0, 0]]))
    runner = _summer(tmp_path)
    call(
        runner,
        "run",
        "--random",
        "--size=sequence_length=3",
        "--size=batch_size=1",
        f"--input=attention_mask={tmp_path}/mask.npy",
    )
    assert runner.calls[0]["attention_mask"].tolist() == [[1, 0, 0]]
    assert runner.calls[0]["input_ids"].shape == (1, 3)


def test_random_inputs_mean_what_their_names_say(tmp_path: Path, call: Call) -> None:
    names = ("input_ids", "position_ids", "token_type_ids")
    runner = ToyRunner(tmp_path, manifest("fill-mask", names, cached=True), lambda _: {"logits": np.zeros((1, 0))})
    sizes = ["--size=sequence_length=3", "--size=batch_size=2", "--size=past_sequence_length=0"]
    result = call(runner, "run", "--random", *sizes)
    assert set(runner.calls[0]) == set(names)
    assert runner.calls[0]["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert runner.calls[0]["token_type_ids"].tolist() == [[0, 0, 0]] * 2
    assert result.stdout.splitlines()[1] == "logits: float64[1, 0]"


def test_random_images_have_the_size_of_the_model(tmp_path: Path, call: Call) -> None:
    write_json(tmp_path, "config.json", {"image_size": 6, "num_channels": 3})
    shape = ("batch_size", "num_channels", "height", "width")
    spec = TensorSpec(name="pixel_values", dtype="float32", shape=shape)
    runner = ToyRunner(tmp_path, manifest("image-classification", ()), lambda _: {"logits": np.zeros(1)})
    object.__setattr__(runner.manifest, "inputs", (spec,))
    call(runner, "run", "--random", "--size=batch_size=2")
    assert runner.calls[0]["pixel_values"].shape == (2, 3, 6, 6)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--input=ids", "Write --input as NAME=VALUE"),
        ("--input==x.npy", "Write --input as NAME=VALUE"),
        ("--size=a=", "Write --size as NAME=VALUE"),
        ("--size=a=many", "The size of a must be a number"),
        ("--input=a=missing.npy", "cannot be read as .npy"),
    ],
)
def test_run_names_what_it_cannot_use(tmp_path: Path, call: Call, argument: str, message: str) -> None:
    result = call(_summer(tmp_path), "run", argument)
    assert result.exit_code == 2
    assert message in result.stderr


def test_run_opens_no_pickles_and_no_archives(tmp_path: Path, call: Call) -> None:
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=1)
    (tmp_path / "text.npy").write_text("1 2 3")
    for name in ("pickle.npy", "several.npz", "text.npy"):
        result = call(_summer(tmp_path), "run", f"--input=input_ids={tmp_path / name}")
        assert result.exit_code == 2
        assert "numpy.save" in result.stderr or "its own .npy file" in result.stderr
        assert "allow_pickle" not in result.stderr


@pytest.mark.parametrize("command", ["run", "embed", "classify", "generate", "chat"])
def test_help_has_examples(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"pipeload {command} models/" in result.stdout
    assert "--budget" in result.stdout


@pytest.mark.parametrize("command", [("embed", "a text"), ("run", "--random")])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, call: Call, command: tuple[str, ...]
) -> None:
    runner = ToyRunner(tmp_path, manifest("feature-extraction"), lambda _: pytest.fail("the model ran"))
    result = call(runner, *command, f"--output={tmp_path}/missing/out.npz")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
