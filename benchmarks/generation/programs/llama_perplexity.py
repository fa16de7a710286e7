"""llama.cpp by llama-cpp-python: the perplexity of a text, which is the order's prompt."""

from __future__ import annotations

import llama_cpp
import numpy as np

from benchmarks.generation.programs.order import read_order, tell

if __name__ == "__main__":
    order = read_order()
    count = len(order.prompt)
    model = llama_cpp.Llama(
        order.model, n_ctx=count, n_batch=count, n_threads=order.threads, logits_all=True, verbose=False
    )
    model.eval(order.prompt)
    logits = model.scores[: count - 1].astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    chosen = shifted[np.arange(count - 1), order.prompt[1:]] - np.log(np.exp(shifted).sum(1))
    tell({"perplexity": float(np.exp(-chosen.mean()))})
