"""The picture of a long text says its model, its limits, and what its lines are."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from benchmarks.generation.long import Report, figure


def test_the_picture_names_model_cap_machine_and_the_planned_peak() -> None:
    report = Report(
        machine={"cores": 2, "cpu": "Some CPU", "versions": {"onnxruntime": "1.2.3"}},
        cap_bytes=900_000_000,
        disk_bytes_per_s=None,
        peak_bytes=700_000_000,
        tokens=200,
        tokens_s=(5.0, *[0.1] * 199),
        rss_bytes=(600_000_000,) * 200,
        peak_rss_bytes=600_000_000,
        planned_peak_bytes=792_400_000,
        budget_bytes=900_000_000,
        cache_bytes=1,
    )
    drawn = figure(report)
    said = "\n".join(text.get_text() for text in drawn.texts)
    for word in ("smollm2-135m", "200 tokens", "cgroup of 900.0 MB", "Some CPU", "The first token took 5.00 s"):
        assert word in said
    words = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert "planned peak of RSS: 792.4 MB" in words
    times, memory = drawn.axes
    assert times.get_xlim() == memory.get_xlim()
    # The first token is left out, as the note says.
    assert max(max(line.get_ydata()) for line in times.lines) == pytest.approx(0.1)
