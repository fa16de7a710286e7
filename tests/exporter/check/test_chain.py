"""A graph that refuses an input is told from a damaged one: to export it again would change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.exporter.models import ROWS, write_onnx

from pipeload.errors import ExportError
from pipeload.notify import silent
from pipeload_export.check.cases import Case
from pipeload_export.check.chain import run_unsplit


def test_inputs_that_a_graph_refuses_are_named_with_what_would_take_them(tmp_path: Path) -> None:
    ids = np.full((1, 7), ROWS)
    case = Case(name="1 x 7", inputs={"input_ids": ids, "attention_mask": np.ones_like(ids)})
    said = r"^The unsplit graph \(1 x 7\) does not run: .*\. Export the model to an \.onnx file that takes inputs of"
    with pytest.raises(ExportError, match=said):
        run_unsplit(write_onnx(tmp_path / "model.onnx"), ["last_hidden_state"], [case], silent)
