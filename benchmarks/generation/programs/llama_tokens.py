"""llama.cpp by llama-cpp-python, its weights memory-mapped, all in fp32; with its rpc-servers, if there are any."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
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


def connect() -> None:
    """Make rpc-servers devices of the library in LLAMA_CPP_LIB_PATH, which has to be built with GGML_RPC."""
    folder = Path(os.environ["LLAMA_CPP_LIB_PATH"])
    add = ctypes.CDLL(str(folder / "libggml-rpc.so")).ggml_backend_rpc_add_server
    add.argtypes, add.restype = [ctypes.c_char_p], ctypes.c_void_p
    register = ctypes.CDLL(str(folder / "libggml.so")).ggml_backend_register
    register.argtypes = [ctypes.c_void_p]
    for server in ORDER.servers:
        register(add(server.encode()))


def open_model() -> Step:
    if ORDER.servers:
        connect()
    if ORDER.as_stored:
        library.llama_model_default_params = as_stored
    model = llama_cpp.Llama(
        ORDER.model,
        n_ctx=(1 + ORDER.again) * len(ORDER.prompt) + ORDER.tokens,
        n_threads=ORDER.threads,
        n_threads_batch=ORDER.threads,
        n_gpu_layers=(sum(ORDER.served) or -1) if ORDER.servers else 0,
        tensor_split=ORDER.served or None,
        use_mmap=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        # What the library says where a server is lost is the only word about it.
        verbose=bool(ORDER.servers),
    )

    def step(new: list[int]) -> tuple[int, float]:
        model.eval(new)
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))
        return int(logits.argmax()), -float(np.log(np.exp(logits - logits.max()).sum()))

    return step


if __name__ == "__main__":
    tell(decode(ORDER, open_model, f"llama-cpp-python {llama_cpp.__version__}"))
