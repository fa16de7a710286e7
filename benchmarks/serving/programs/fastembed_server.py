"""fastembed behind `/v1/embeddings`: the same ONNX file, in a session with fastembed's defaults.

Runs in fastembed's own virtual environment: FOLDER PORT, with `model.onnx` and its tokenizer in the folder.
"""

from __future__ import annotations

import sys

import uvicorn
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_NAME = "minilm"


def main() -> None:
    folder, port = sys.argv[1:]
    TextEmbedding.add_custom_model(
        _NAME, PoolingType.MEAN, True, ModelSource(hf=_NAME), dim=384, model_file="model.onnx"
    )
    model = TextEmbedding(_NAME, specific_model_path=folder)

    async def embeddings(request: Request) -> Response:
        body = await request.json()
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        vectors = await run_in_threadpool(lambda: list(model.embed(texts)))
        data = [{"object": "embedding", "index": i, "embedding": one.tolist()} for i, one in enumerate(vectors)]
        return JSONResponse({"object": "list", "model": _NAME, "data": data})

    app = Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
