"""`pipeload run`: arrays in, arrays out, and arrays that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.cli.toy_models import Call
from tests.engine.tasks.fakes import Array, ToyRunner, manifest, write_json

from pipeload.format.manifest import TensorSpec

pytest.importorskip("tokenizers")


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
    assert loads[0][2] == {"progress": None, "draft": None, "sizes": {"sequence_length": 5, "batch_size": 2}}
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


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 17 + ",)}", "(" * 500, "{'descr': [(", "{}"],
)
def test_run_names_an_array_that_numpy_cannot_read(tmp_path: Path, call: Call, header: str) -> None:
    text = f"{header:<1000}\n".encode()
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    result = call(_summer(tmp_path), "run", f"--input=input_ids={tmp_path / 'x.npy'}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot be read as .npy" in result.stderr


def test_run_says_how_long_a_text_may_be(tmp_path: Path, call: Call) -> None:
    write_json(tmp_path, "config.json", {"max_position_embeddings": 5})
    result = call(_summer(tmp_path), "run", "--random", "--size=batch_size=1", "--size=sequence_length=6")
    assert result.exit_code == 1
    assert "input_ids has 6 tokens, and the model has positions for at most 5. Shorten it" in str(result.exception)
