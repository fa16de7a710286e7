"""llama.cpp by llama-cpp-python, its weights memory-mapped, all in fp32."""

from __future__ import annotations

from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as library
import numpy as np

from benchmarks.generation.programs.order import Step, decode, read_order, tell

ORDER = read_order()


DEFAULTS = library.llama_model_default_params


def as_stored() -> Any:
    """The defaults of llama.cpp, whose CPU lays some types of blocks out anew, but for that."""
    parameters = DEFAULTS()
    parameters.use_extra_bufts = False
    return parameters


def open_model() -> Step:
    if ORDER.as_stored:
        library.llama_model_default_params = as_stored
    model = llama_cpp.Llama(
        ORDER.model,
        n_ctx=(1 + ORDER.again) * len(ORDER.prompt) + ORDER.tokens,
        n_threads=ORDER.threads,
        n_threads_batch=ORDER.threads,
        use_mmap=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )

    def step(new: list[int]) -> tuple[int, float]:
        model.eval(new)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))
        return int(logits.argmax()), -float(np.log(np.exp(logits - logits.max()).sum()))

    return step


if __name__ == "__main__":
    tell(decode(ORDER, open_model, f"llama-cpp-python {llama_cpp.__version__}"))
