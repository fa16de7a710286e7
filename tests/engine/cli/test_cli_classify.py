"""`pipeload classify`: labels, entities, images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from tests.engine.cli.toy_models import Call, classifier_in, encoder_in
from tests.engine.tasks.fakes import ToyRunner, manifest, write_json

pytest.importorskip("tokenizers")


def test_classify_prints_labels_below_each_text(tmp_path: Path, call: Call) -> None:
    result = call(classifier_in(tmp_path), "classify", "the", "sat", "--top-k", "1")
    assert result.stdout == "the\n  0.7311  bad\nsat\n  0.8808  good\n"


def test_classify_reads_lines_and_prints_json(tmp_path: Path, call: Call) -> None:
    result = call(classifier_in(tmp_path), "classify", "-", "--json", stdin="the\nsat\n")
    rows = json.loads(result.stdout)
    assert [row["input"] for row in rows] == ["the", "sat"]
    assert [label["label"] for label in rows[1]["labels"]] == ["good", "bad"]
    assert rows[1]["labels"][0]["score"] == pytest.approx(0.8808, abs=1e-4)


def test_classify_prints_a_line_of_json_for_each_text(tmp_path: Path, call: Call) -> None:
    result = call(classifier_in(tmp_path), "classify", "the", "sat", "--jsonl", "--top-k=1")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["input"], row["labels"][0]["label"]) for row in rows] == [("the", "bad"), ("sat", "good")]


def test_classify_without_a_text_is_refused(tmp_path: Path, call: Call) -> None:
    result = call(classifier_in(tmp_path), "classify", "-", stdin="\n")
    assert result.exit_code == 2
    assert "stdin has no text" in result.stderr


@pytest.mark.parametrize("command", ["embed", "classify", "generate"])
def test_an_image_file_is_not_taken_for_a_text(tmp_path: Path, call: Call, command: str) -> None:
    (tmp_path / "cat.jpg").touch()
    runner = classifier_in(tmp_path) if command == "classify" else encoder_in(tmp_path)
    result = call(runner, command, str(tmp_path / "cat.jpg"))
    assert result.exit_code == 2
    assert f"{tmp_path}/cat.jpg is an image file, and " in result.stderr
    assert runner.calls == []


def test_a_text_that_only_looks_like_a_file_is_a_text(tmp_path: Path, call: Call) -> None:
    assert call(encoder_in(tmp_path), "embed", "missing.jpg", "x" * 5000 + ".png").exit_code == 0


@pytest.mark.parametrize("command", [("embed",), ("classify", "--top-k=1")])
def test_texts_that_are_cut_are_warned_about_once(tmp_path: Path, call: Call, command: tuple[str, ...]) -> None:
    runner = classifier_in(tmp_path) if command[0] == "classify" else encoder_in(tmp_path)
    result = call(runner, *command, "-", stdin="the cat sat on the mat " * 4 + "\n" + "the\n" * 600 + "dog " * 90)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: Texts with more than the 16 tokens that the model takes were cut there.")


def test_classify_shows_entities_with_their_place(tmp_path: Path, call: Call) -> None:
    runner = classifier_in(tmp_path)
    write_json(tmp_path, "config.json", {"id2label": {"0": "O", "1": "PER"}})
    runner.manifest = manifest("token-classification")
    runner.function = lambda inputs: {"logits": np.eye(2, dtype=np.float32)[(inputs["input_ids"] == 17) * 1] * 9}
    result = call(runner, "classify", "Anna sat")
    assert result.stdout == "Anna sat\n  0.9999  PER  anna  0-4\n"
    facts = json.loads(call(runner, "classify", "Anna sat", "--json").stdout)[0]["labels"]
    assert [(fact["word"], fact["start"], fact["end"]) for fact in facts] == [("anna", 0, 4)]
    twice = [call(runner, "classify", "Anna Anna", "--aggregation", how).stdout for how in ("none", "first")]
    assert [lines.count("PER") for lines in twice] == [2, 1]


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
