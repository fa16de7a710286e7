"""The program of the export's child process: load a model into torch, trace it to ONNX. See `tracing`."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pipeload_export.source.gaps import Gaps, load_whole, refuse_missing
from pipeload_export.source.gguf import GgufFile, reading_once
from pipeload_export.source.gguf_places import places_in_gguf
from pipeload_export.source.hollow import Hollow, hollow_model, places_in_folder
from pipeload_export.source.image_processor import resolve_image_processor
from pipeload_export.source.left_out import weights_left_out
from pipeload_export.source.older_form import view_of
from pipeload_export.source.refused import Declined, Refused, only_trusted_code, reason
from pipeload_export.source.ropes import follow_lengths
from pipeload_export.source.task import TASKS, is_encoder_alone, is_projected
from pipeload_export.source.tokenizer import resolve_tokenizer
from pipeload_export.source.trace import LEAST_DISK_BYTES, check_supported, trace
from pipeload_export.source.tracing import GAPS_NAME, Request, Seeded
from pipeload_export.source.widened import widen

__all__ = ["attention_of", "load_hollow", "load_model", "run_child", "seeded_model", "serve"]

Asked = TypeVar("Asked", bound=msgspec.Struct)

_PR_SET_PDEATHSIG = 1
_EAGER = {"attn_implementation": "eager"}
"""Attention by the plain formula. PyTorch's own function knows no soft-capping (Gemma-2), and takes another mask."""
_SDPA = {"attn_implementation": "sdpa"}
_CACHED = {"text-generation": "text-generation-with-past"}
"""A decoder without a cache would run the whole text again for every token."""


def run_child(request_path: str, folder: str, parent: str) -> None:
    """Carry out the request, and leave the answer beside the folder."""
    serve(Request, _export, request_path, folder, parent)


def serve(kind: type[Asked], work: Callable[[Asked, Path], None], request_path: str, folder: str, parent: str) -> None:
    """Do the work of a child process, and leave the answer beside the folder.

    Args:
        kind: the request's type.
        work: carries a request out in a folder.
        request_path: file of the request.
        folder: where the results go.
        parent: the process that waits; when it ends, so does this one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    request = msgspec.json.decode(Path(request_path).read_bytes(), type=kind)
    error, number, declined = None, None, None
    try:
        work(request, Path(folder))
    except Declined as other:
        declined = str(other)
    except Refused as refusal:
        error = str(refusal)
    except Exception as exception:  # whatever the libraries raise becomes the parent's ExportError
        logging.getLogger("pipeload_export").exception("export failed")
        error = (
            f"{reason(exception)}. Check that the checkpoint is complete, with its preprocessor_config.json if it "
            "takes images. Or export it to one .onnx file yourself and pass that; --verbose shows what the libraries "
            "print."
        )
        if (number := _full(exception, Path(folder).parent)) is not None:
            # The answer needs room as well.
            shutil.rmtree(folder, ignore_errors=True)
    Path(folder).with_name("result.json").write_text(
        json.dumps({"error": error, "errno": number, "declined": declined})
    )


def _full(exception: Exception, folder: Path) -> int | None:
    """The system's number of a full disk, if that is why the export failed."""
    if isinstance(exception, OSError) and exception.errno in (errno.ENOSPC, errno.EDQUOT):
        return exception.errno
    return errno.ENOSPC if shutil.disk_usage(folder).free < LEAST_DISK_BYTES else None


def _export(request: Request, folder: Path) -> None:
    warnings.simplefilter("ignore")
    hollow = load_hollow(request, folder) if request.hollow else None
    model = hollow.model if hollow else load_model(request, folder)
    follow_lengths(model)
    if request.gguf_path:
        _save_gguf_tokenizer(request.gguf_path, folder)
    if request.folder:
        checkpoint = folder if request.gguf else folder.with_name("checkpoint")
        resolve_tokenizer(checkpoint, folder, trust_remote_code=request.trust_remote_code)
        if model.main_input_name == "pixel_values":
            resolve_image_processor(checkpoint, folder)
    model.config.use_cache = request.task in _CACHED
    task = _CACHED.get(request.task, request.task)
    with weights_left_out(hollow, folder) if hollow else nullcontext():
        trace(model, folder, task=task, opset=request.opset)
    if (gaps := folder / GAPS_NAME).exists() and not request.allow_missing:
        found = msgspec.json.decode(gaps.read_bytes(), type=Gaps)
        refuse_missing(folder.glob("*.onnx"), found, type(model).__name__, request.task, Path(str(request.folder)))


def load_model(request: Request, folder: Path) -> Any:
    """The model of transformers; what a checkpoint lacks is written into `folder`."""
    if request.seeded:
        return seeded_model(request.seeded)
    assert request.folder is not None
    if request.gguf_path:
        return _gguf_model(request.gguf_path)
    return _checkpoint_model(request, folder)


def seeded_model(seeded: Seeded) -> Any:
    """The model of transformers, its weights made from the seed."""
    import torch
    import transformers

    kind = getattr(transformers, seeded.config_class)
    config = kind(**seeded.config, **attention_of(kind(**seeded.config)))
    torch.manual_seed(seeded.seed)
    return getattr(transformers, seeded.model_class)(config).to(getattr(torch, seeded.dtype)).float()


def attention_of(config: Any) -> dict[str, str]:
    """The implementation of attention that a model is loaded with, to be traced and to be its reference."""
    # Eager, transformers 4.57 adds the alibi of Falcon twice: in the mask, and to the scores.
    return _SDPA if config.model_type == "falcon" and config.alibi else _EAGER


@reading_once()
def _save_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Save the tokenizer in a GGUF file: optimum copies that of a checkpoint by itself, but not this one."""
    import transformers

    found = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    GgufFile(path).complete_tokenizer(found).save_pretrained(folder)


@reading_once()
def _gguf_model(path: Path) -> Any:
    """The model in a GGUF file, with its weights as float32.

    It repeats `from_pretrained`, which insists on the package accelerate without using any of it.
    """
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    gguf = GgufFile(path)
    config = _gguf_config(path, gguf)
    model = transformers.AutoModelForCausalLM.from_config(config, **attention_of(config))
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing = set(model.load_state_dict(tensors, strict=False).missing_keys) - set(model._tied_weights_keys or ())
    if missing:
        raise Refused(f"the file lacks {len(missing)} of the model's weights, such as {min(missing)}.")
    gguf.apply(model)
    return model


@reading_once()
def _gguf_hollow(path: Path, folder: Path) -> Hollow:
    """The model in a GGUF file without its weights; small ones go into the folder."""
    import torch
    import transformers

    gguf = GgufFile(path)
    config = _gguf_config(path, gguf)
    make = transformers.AutoModelForCausalLM.from_config
    hollow = hollow_model(
        lambda: make(config, dtype=torch.float32, **attention_of(config)),
        lambda model: places_in_gguf(path, model, folder),
    )
    gguf.apply(hollow.model)
    return hollow


def _gguf_config(path: Path, gguf: GgufFile) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    check_supported(config.model_type, _CACHED["text-generation"])
    gguf.configure(config)
    return config


def _class_of(config: Any, task: str) -> Any:
    """The class of transformers that loads a checkpoint for a task."""
    import transformers

    named = str(next(iter(config.architectures or ()), ""))
    special = is_encoder_alone(named) or is_projected(named)
    if task == "feature-extraction" and special and hasattr(transformers, named):
        # AutoModel has no more than one class for a config: the encoder with its decoder, the tower without projection.
        # Classes of a checkpoint's own code are found by AutoModel alone.
        return getattr(transformers, named)
    return getattr(transformers, TASKS[task])


def _checkpoint_model(request: Request, folder: Path) -> Any:
    """The model in a checkpoint folder; what the checkpoint lacks is written into `folder`."""
    import torch

    source, options = _opened(request, folder)
    if request.widened_bytes:
        widen(source)
    with only_trusted_code():
        config = _config_of(source, request.task, options)
        model, gaps = load_whole(
            _class_of(config, request.task),
            source,
            allow_missing=request.allow_missing,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            **attention_of(config),
            **options,
        )
    if gaps != Gaps():
        (folder / GAPS_NAME).write_bytes(msgspec.json.encode(gaps))
    _pad(model.config, request.task)
    return model


def load_hollow(request: Request, folder: Path) -> Hollow:
    """The model of a checkpoint without its weights. Raises Declined if that is not possible."""
    import torch

    if request.gguf:
        return _gguf_hollow(Path(str(request.folder), request.gguf), folder)
    source, options = _opened(request, folder)
    with only_trusted_code():
        config = _config_of(source, request.task, options)
    if hasattr(config, "auto_map"):
        raise Declined("its Python code is its own")
    kind = _class_of(config, request.task)
    # Classes of models have the function under a name of their own.
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    hollow = hollow_model(
        lambda: make(config, dtype=torch.float32, **attention_of(config)), partial(places_in_folder, checkpoint=source)
    )
    _pad(hollow.model.config, request.task)
    return hollow


def _opened(request: Request, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A view of the checkpoint folder, and how transformers opens it."""
    trusted = request.trust_remote_code
    source = view_of(Path(str(request.folder)), folder.with_name("checkpoint"))
    # All files are here by now; only a model's own code may be in another repository.
    return source, {"trust_remote_code": trusted, "local_files_only": not trusted}


def _config_of(source: Path, task: str, options: dict[str, Any]) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, **options)
    check_supported(config.model_type, _CACHED.get(task, task))
    return config


def _pad(config: Any, task: str) -> None:
    """Give a model for labels of texts an id for padding."""
    if task == "text-classification" and config.pad_token_id is None:
        # Such a model labels a text's last token, whatever it is: transformers takes one text at a time. With an id
        # that no token has, batches are traced, and the engine takes one text at a time, too.
        config.pad_token_id = -1
