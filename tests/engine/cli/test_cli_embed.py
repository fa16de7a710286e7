"""`pipeload embed`: figures, similarities, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.cli.toy_models import Call, encoder_in

pytest.importorskip("tokenizers")

from pipeload.cli import texts


def test_embed_shows_the_figures_of_one_text(tmp_path: Path, call: Call) -> None:
    result = call(encoder_in(tmp_path), "embed", "the cat")
    assert result.exit_code == 0
    assert result.stdout.endswith("...  (12 figures)\n")
    assert len(result.stdout.split()) == 8 + 3
    assert result.stderr == ""


def test_embed_shows_the_similarities_of_several_texts(tmp_path: Path, call: Call) -> None:
    lines = call(encoder_in(tmp_path), "embed", "the cat", "dog", "the cat").stdout.splitlines()
    assert [line.split()[0:3:2] for line in lines] == [["1.000", "1.000"], [lines[1].split()[0]] * 2, ["1.000"] * 2]
    assert lines[1].endswith("  dog")


def test_embed_reads_stdin_and_files_and_writes_json_and_npy(tmp_path: Path, call: Call) -> None:
    lines, output = tmp_path / "lines.txt", tmp_path / "out.npy"
    lines.write_text("the dog\n\n  \nsat\n")
    result = call(
        encoder_in(tmp_path),
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
    result = call(encoder_in(tmp_path), "embed", "cat", f"--output={tmp_path / 'vectors'}")
    assert (result.exit_code, result.stdout) == (0, "")
    assert np.load(tmp_path / "vectors").shape == (1, 12)


def test_embed_needs_a_text(tmp_path: Path, call: Call) -> None:
    result = call(encoder_in(tmp_path), "embed")
    assert result.exit_code == 2
    assert "Give at least one TEXT" in result.stderr


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"\xff", "no UTF-8 text")])
def test_embed_names_a_file_that_is_no_text(tmp_path: Path, call: Call, content: bytes | None, message: str) -> None:
    file = tmp_path / "f"
    if content is not None:
        file.write_bytes(content)
    result = call(encoder_in(tmp_path), "embed", f"--file={file}")
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_budget_goes_to_load_and_the_statistics_to_stderr(
    tmp_path: Path, call: Call, loads: list[tuple[Any, ...]]
) -> None:
    result = call(encoder_in(tmp_path), "embed", "cat", "--budget", "96MB", "--stats")
    assert loads == [(tmp_path, "96MB", {"progress": None})]
    assert result.stderr.startswith("2 passes, 0 B read, peak 123.0 MB of 256.0 MB\nplan: 1 Loading Agent, 0 buffers")
    call(encoder_in(tmp_path), "embed", "cat")
    assert loads[1][1] == "auto"


def test_embed_reads_no_file_without_end(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_MOST_BYTES", 1000)
    result = call(encoder_in(tmp_path), "embed", "--file=/dev/zero")
    assert result.exit_code == 2
    assert "/dev/zero cannot be read: it holds more than the 1.0 kB" in result.stderr


def test_embed_writes_the_same_figures_as_csv(tmp_path: Path, call: Call) -> None:
    for name in ("v.csv", "v.npy"):
        assert call(encoder_in(tmp_path), "embed", "cat", "the dog", f"--output={tmp_path / name}").exit_code == 0
    np.testing.assert_array_equal(
        np.loadtxt(tmp_path / "v.csv", delimiter=",", dtype=np.float32), np.load(tmp_path / "v.npy")
    )


def test_embed_writes_no_format_that_its_name_does_not_say(tmp_path: Path, call: Call) -> None:
    result = call(encoder_in(tmp_path), "embed", "cat", f"--output={tmp_path / 'v.json'}")
    assert result.exit_code == 2
    assert "v.json is neither .npy nor .csv" in result.stderr


def test_embed_of_many_texts_is_no_matrix_on_the_screen(tmp_path: Path, call: Call) -> None:
    result = call(encoder_in(tmp_path), "embed", "-", stdin="the cat\n" * 200)
    assert result.stdout == "200 vectors of 12 figures. --output FILE saves them, --jsonl prints them.\n"


def test_embed_prints_a_line_of_json_for_each_text(tmp_path: Path, call: Call) -> None:
    plain = [json.loads(line) for line in call(encoder_in(tmp_path), "embed", "the cat", "--jsonl").stdout.splitlines()]
    options = ("--jsonl", "--prompt", "the ", "--normalize", "--truncate-dim", "3")
    result = call(encoder_in(tmp_path), "embed", "cat", "dog", *options)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["cat", "dog"]
    figures = np.array(plain[0]["embedding"][:3])
    np.testing.assert_allclose(rows[0]["embedding"], figures / np.linalg.norm(figures), rtol=1e-5)


def test_the_budget_may_come_from_the_environment(
    tmp_path: Path, call: Call, loads: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELOAD_BUDGET", "96MB")
    call(encoder_in(tmp_path), "embed", "cat")
    call(encoder_in(tmp_path), "embed", "cat", "--budget", "1GB")
    assert [load[1] for load in loads] == ["96MB", "1GB"]
