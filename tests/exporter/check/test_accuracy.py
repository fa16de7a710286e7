"""What rounding does to the answers is measured beside the source, kept, printed, and refused where it is too much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.exporter.graphs import encoder

from pipeload.cli.report import accuracy_report
from pipeload.errors import ConfigError, ExportError
from pipeload.format.manifest import Accuracy, OutputError, SmallWeights, read
from pipeload_export import export
from pipeload_export.check import accuracy as measuring
from pipeload_export.check.accuracy import accuracy_cases, check_error, compared_outputs, measure_accuracy
from pipeload_export.check.chain import run_unsplit


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return encoder(layers=3).save(tmp_path / "model.onnx")


def test_an_export_reports_the_error_and_keeps_it(source: Path, tmp_path: Path) -> None:
    eight = export(source, tmp_path / "eight", weights="int8").small_weights
    four = export(source, tmp_path / "four", weights="int4").small_weights
    assert eight
    assert four
    assert (eight.bits, eight.fine_bits, four.bits, four.fine_bits) == (8, 8, 4, 8)
    assert eight == read(tmp_path / "eight").small_weights
    assert eight.accuracy
    assert four.accuracy
    (small,), (large,) = eight.accuracy.outputs, four.accuracy.outputs
    assert 0 < small.mean_abs_error <= small.max_abs_error
    assert 0 < small.max_rel_error < 0.1
    assert small.mean_abs_error < large.mean_abs_error / 2
    assert small.max_rel_error < large.max_rel_error


def test_more_than_the_largest_error_is_refused_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"changes output '.*' by up to .* of its range.*--max-error allows 1e-06"):
        export(source, tmp_path / "target", weights="int4", max_error=1e-6)
    assert not (tmp_path / "target").exists()
    assert export(source, tmp_path / "target", weights="int4", max_error=1.0).small_weights


@pytest.mark.parametrize("options", [{"weights": "fp32"}, {"weights": "int8", "verify": False}], ids=str)
def test_a_largest_error_that_nothing_measures_is_refused(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only measured where weights are rounded"):
        export(tmp_path / "absent.onnx", tmp_path / "target", max_error=0.1, **options)  # type: ignore[arg-type]


def test_answers_that_are_no_numbers_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = export(source, tmp_path / "target", weights="int8", verify=False)
    cases = accuracy_cases(tmp_path / "target", manifest)
    wanted = run_unsplit(source, compared_outputs(manifest), cases, lambda *_: None)
    monkeypatch.setattr(measuring, "given_room", lambda _, call: {n: a * np.nan for n, a in call().items()})
    with pytest.raises(ExportError, match=r"values that are no numbers.*--weights fp32"):
        measure_accuracy(tmp_path / "target", manifest, cases, wanted, lambda *_: None)


def test_perplexity_is_that_of_its_definition() -> None:
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]]], np.float32))
    found = measuring._perplexity(logits, np.array([[0, 1, 2]]))
    assert found == pytest.approx((0.25 * 0.8) ** -0.5)


def test_the_worst_text_gives_the_cosine_and_all_rows_the_first_choices() -> None:
    one = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
    other = np.array([[[1.0, 0.0], [1.0, 0.0]], [[3.0, 4.0], [0.0, 0.0]]])
    assert measuring._cosine(one, other) == pytest.approx(0.8)
    assert measuring._top1([(one[:, 0], one[:, 0]), (one[:, 0], one[::-1, 0])]) == pytest.approx(0.5)


def test_the_report_names_bits_errors_and_perplexities() -> None:
    error = OutputError(output="logits", max_abs_error=0.5, mean_abs_error=0.01, max_rel_error=0.02)
    found = Accuracy(inputs=("a",), outputs=(error,), top1=0.975, perplexity=22.0, source_perplexity=20.0)
    small = SmallWeights(bits=4, fine_bits=8, block_size=32, symmetric=True, accuracy=found)
    text = accuracy_report(small)
    for words in ("4 bits", "narrow in 8", "32 weights to a scale", "5.00e-01", "97.5%", "22.00", "20.00", "+10.00%"):
        assert words in text
    assert "not compared" in accuracy_report(replace(small, accuracy=None))


def test_errors_are_held_against_the_limit_by_the_worst_output() -> None:
    errors = [
        OutputError(output=n, max_abs_error=1, mean_abs_error=1, max_rel_error=e) for n, e in (("a", 0.1), ("b", 0.3))
    ]
    check_error(Accuracy(inputs=(), outputs=tuple(errors)), 0.3)
    with pytest.raises(ExportError, match="output 'b'"):
        check_error(Accuracy(inputs=(), outputs=tuple(errors)), 0.2)
