"""Ctrl-C after the target is in its place: it is there as a whole, and the caller is told so."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.exporter.models import write_onnx

from pipeload_export import export
from pipeload_export.staging import Staging


@pytest.mark.parametrize("moment", ["before the exchange", "after it"])
def test_an_export_has_succeeded_once_its_target_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    commit, target = Staging.commit, tmp_path / "made" / "target"

    def interrupted(staging: Staging) -> None:
        if moment == "after it":
            commit(staging)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "commit", interrupted)
    source = write_onnx(tmp_path / "source" / "model.onnx", blocks=2)
    if moment == "after it":
        assert export(source, target, verify=False).shards
        assert [path.name for path in target.parent.iterdir()] == ["target"]
    else:
        with pytest.raises(KeyboardInterrupt):
            export(source, target, verify=False)
        assert list(target.parent.iterdir()) == []
