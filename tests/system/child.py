"""A process that uses models, one order after another: `python -m tests.system.child`, a JSON line each way.

An error of pipeload is told. Any other one ends the process, with its traceback: it breaks the promise.
"""

from __future__ import annotations

import faulthandler
import json
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

__all__: list[str] = []

_TEXTS = ["A man is eating food.", "The girl is carrying a baby."]


class _Worker:
    def __init__(self) -> None:
        self._model: Any = None

    def load(self, directory: str, budget: int | str, **options: Any) -> None:
        import pipeload

        self._model = pipeload.load(directory, budget, **options)

    def call(self, task: str, size: int = 4) -> list[float]:
        """The answer's numbers."""
        import numpy as np

        model = self._model
        if task == "embed":
            return [float(one) for one in model.embed(_TEXTS).ravel()]
        ids = np.arange(3, 3 + size, dtype=np.int64)[None] % 90 + 3
        if task == "generate":
            return [
                float(one) for one in model.generate(ids[0].tolist(), max_new_tokens=size, do_sample=False).token_ids
            ]
        arrays = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.arange(size, dtype=np.int64)[None],
        }
        outputs = model.run({spec.name: arrays[spec.name] for spec in model.inputs})
        return [float(one) for one in outputs[model.outputs[0].name].ravel()[:4096]]

    def set_budget(self, budget: int | str) -> None:
        self._model.set_budget(budget)

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        self._model = None

    def limit(self, name: str, value: int) -> None:
        """Set a limit of the system for this process."""
        number = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))

    def facts(self) -> dict[str, int]:
        """The budget and the memory of the process, in bytes."""
        status = Path("/proc/self/status").read_text()
        names = {"peak": "VmHWM", "rss": "VmRSS", "space": "VmSize"}
        sizes = {name: int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) * 1024 for name, field in names.items()}  # type: ignore[index]
        return {**sizes, "budget": self._model.plan.budget_bytes if self._model else 0}


def main() -> None:
    """Do as ordered until stdin ends."""
    from pipeload.errors import PipeloadError

    # A process that hangs is asked where.
    faulthandler.register(signal.SIGUSR1)
    worker = _Worker()
    for line in sys.stdin:
        order = json.loads(line)
        told: dict[str, Any] = {}
        try:
            told["result"] = getattr(worker, order.pop("do"))(**order)
        except PipeloadError as error:
            told["error"] = [type(error).__name__, str(error)]
            told["needed"] = getattr(error, "needed_bytes", 0)
        print(json.dumps(told), flush=True)
    worker.close()


if __name__ == "__main__":
    main()
