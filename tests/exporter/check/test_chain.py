"""What the chain of shards and the unsplit graph answer, and what refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.exporter.models import ROWS, write_onnx

from pipeload.errors import ExportError
from pipeload.notify import silent
from pipeload_export.check.cases import Case
from pipeload_export.check.chain import _rounded_again, run_unsplit


def test_inputs_that_a_graph_refuses_are_named_with_what_would_take_them(tmp_path: Path) -> None:
    ids = np.full((1, 7), ROWS)
    case = Case(name="1 x 7", inputs={"input_ids": ids, "attention_mask": np.ones_like(ids)})
    said = r"^The unsplit graph \(1 x 7\) does not run: .*\. Export the model to an \.onnx file that takes inputs of"
    with pytest.raises(ExportError, match=said):
        run_unsplit(write_onnx(tmp_path / "model.onnx"), ["last_hidden_state"], [case], silent)


def test_another_rounding_moves_one_value_in_twelve_by_one_step_and_no_mask() -> None:
    values = np.array([0.1, -3.0, 100.0, -65504.0, -np.inf, -1e4], np.float16).repeat(6000).reshape(6, -1)
    moved = _rounded_again(values, np.random.default_rng(0))
    assert moved.dtype == np.float16
    assert (moved[3:] == values[3:]).all()
    for before, after in zip(values[:3], moved[:3], strict=True):
        steps = (after - before) / np.spacing(np.abs(before))
        assert set(np.unique(steps)) == {-1.0, 0.0, 1.0}
        assert abs(np.mean(steps)) < 0.01
        assert abs(np.mean(steps**2) - 1 / 12) < 0.01
