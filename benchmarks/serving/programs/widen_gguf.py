"""A GGUF file's weights in float32, by llama.cpp: SOURCE TARGET. Runs in its virtual environment."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp


def main() -> None:
    source, target = sys.argv[1:]
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
    how.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(how)):
        sys.exit(f"llama.cpp did not convert {source}")


if __name__ == "__main__":
    main()
