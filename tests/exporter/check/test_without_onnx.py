"""Files and weights are verified where the extra [export] is not installed."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {"onnx", "optimum", "torch", "transformers"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import pipeload_export.check.verify
"""


def test_the_checks_are_imported_without_the_extra() -> None:
    subprocess.run([sys.executable, "-c", _PROGRAM], check=True, timeout=60)
