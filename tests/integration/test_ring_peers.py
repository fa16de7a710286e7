"""`benchmarks.ring peers`: what llama.cpp's servers get fits them, and a wrong answer has no figure and no place."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from benchmarks.ring import peers
from benchmarks.study import Parts

XL = peers.Layers(blocks=48, block_bytes=126_240_000, head_bytes=321_644_800)
BUDGET = 2_000_000_000


@pytest.mark.parametrize("servers", range(7))
@pytest.mark.parametrize("first_bytes", [None, 1_600_000_000, 0])
def test_layers_fit_their_servers_and_one_more_would_not(servers: int, first_bytes: int | None) -> None:
    served = peers.shares(XL, servers, BUDGET, first_bytes=first_bytes)
    assert len(served) == servers
    assert sum(served) <= XL.blocks + 1
    for number, count in enumerate(served):
        last = number == servers - 1
        room = BUDGET if number or first_bytes is None else first_bytes
        taken = (count - last) * XL.block_bytes + last * XL.head_bytes
        assert count == last or taken + peers.SERVER_BYTES <= room
        assert sum(served) > XL.blocks or taken + XL.block_bytes + peers.SERVER_BYTES > room


def _report(**theirs: object) -> peers.Report:
    ours = peers.Record(
        engine="pipeload", way="cluster", nodes=1, token_s=2.0, read_bytes=9, peak_bytes={"board-1": 5}, right=True
    )
    other = {"engine": "llama.cpp", "way": "servers", "nodes": 1, "peak_bytes": {"board-1": 5}} | theirs
    return peers.Report(
        model="toy",
        budget_bytes=10,
        bits_per_s=1,
        read_bytes_per_s=1,
        llama="1.0",
        machine={"cores": 2, "cpu": "some", "onnxruntime": "1"},
        records=[ours, peers.Record(**other)],  # type: ignore[arg-type]
    )


def test_who_is_killed_is_no_failure() -> None:
    report = _report(killed=("board-1",), message="lost")
    assert report.ok
    assert "killed on board-1" in peers.rows(report)


def test_a_wrong_answer_has_no_figure_and_is_not_published(tmp_path: Path) -> None:
    report = _report(token_s=3.25, read_bytes=4, right=False)
    assert "3.25" not in peers.rows(report)
    page, parts = tmp_path / "README.md", Parts(folder=tmp_path, kinds={"peers": (peers.Report, peers.rows)})
    page.write_text("nothing yet")
    with pytest.raises(typer.Exit):
        parts.keep("peers", report, None)
    assert page.read_text() == "nothing yet"
    assert not (tmp_path / "results" / "peers.json").exists()
    assert (tmp_path / "results" / "peers.wrong.json").exists()


def test_pipeload_beyond_its_budget_is_a_failure() -> None:
    report = _report(token_s=3.25, right=True)
    assert report.ok
    report.records[0].peak_bytes["board-1"] = 10 + peers.BESIDE_BYTES + 1
    assert not report.ok
