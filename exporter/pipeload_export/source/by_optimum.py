"""A model of transformers -> an ONNX graph, by optimum, which traces it with trial inputs of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from pipeload_export.source.refused import Refused
from pipeload_export.source.task import TASKS, is_encoder_alone, is_projected

__all__ = ["check_supported", "trace"]


class _LastOrNone(list[Any]):
    """A checkpoint's preprocessors. optimum asks for the last, and expects None where there is none."""

    def __getitem__(self, place: Any) -> Any:
        return super().__getitem__(place) if self else None


@contextmanager
def _as_models_are() -> Iterator[None]:
    """Where optimum's trial inputs or its patches are not what the models take, they are, while the context lasts.

    What it makes of a model is the same whatever other packages are installed.
    """
    from optimum.exporters.onnx import base
    from optimum.utils import input_generators, save_utils

    load = save_utils.maybe_load_preprocessors

    def load_or_none(*args: Any, **options: Any) -> _LastOrNone:
        return _LastOrNone(load(*args, **options))

    with (
        _falcon_rounds(),
        mock.patch.object(save_utils, "maybe_load_preprocessors", load_or_none),
        # Beside accelerate optimum would look for the values of tied weights, which a hollow model's graph lacks.
        mock.patch.object(base, "is_accelerate_available", return_value=False),
        _made(input_generators.DummyPastKeyValuesGenerator, _grouped),
        _made(input_generators.FalconDummyPastKeyValuesGenerator, _repeated),
    ):
        yield


def _made(kind: type, mend: Callable[[Any, Any], None]) -> Any:
    """A patch that mends each new object of this very class, by its config."""
    begin = kind.__init__  # type: ignore[misc]

    def begin_and_mend(self: Any, task: str, normalized_config: Any, *args: Any, **options: Any) -> None:
        begin(self, task, normalized_config, *args, **options)
        if type(self) is kind:
            mend(self, normalized_config.config)

    return mock.patch.object(kind, "__init__", begin_and_mend)


def _grouped(generator: Any, config: Any) -> None:
    """Phi's caches have the heads of keys, which are fewer than those of queries."""
    heads = getattr(config, "num_key_value_heads", None) or generator.num_attention_heads
    generator.hidden_size = generator.hidden_size // generator.num_attention_heads * heads
    generator.num_attention_heads = heads


def _repeated(generator: Any, config: Any) -> None:
    """Falcon's newer form repeats keys and values for each head before it keeps them."""
    if config.new_decoder_architecture:
        generator.num_kv_heads = generator.num_attention_heads


def _falcon_rounds() -> Any:
    """A patch that lets Falcon round its alibi to bfloat16 while it is traced, as transformers does.

    optimum traces with a `Tensor.bfloat16` that does nothing, and onnxruntime multiplies no bfloat16 on a CPU: here
    numbers are rounded, and multiplied as float32, which is what torch does with two of bfloat16.
    """
    import torch
    from transformers.models.falcon import modeling_falcon

    build = modeling_falcon.build_alibi_tensor

    def rounded(tensor: Any) -> Any:
        return tensor.to(torch.bfloat16).to(torch.float32)

    def build_rounded(attention_mask: Any, num_heads: int, dtype: Any) -> Any:
        # At position 1 alibi is the slope of a head.
        slopes = build(attention_mask.new_ones(1, 2), num_heads, torch.float32)[:, :, 1]
        positions = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
        alibi = rounded(rounded(slopes) * rounded(positions))
        return alibi.flatten(0, 1)[:, None].to(dtype)

    return mock.patch.object(modeling_falcon, "build_alibi_tensor", build_rounded)


def check_supported(model_type: str, task: str) -> None:
    """Refuse what optimum does not export.

    Raises:
        Refused: it knows no models of that type, or not that task for them.
    """
    import optimum.exporters.onnx.model_configs  # noqa: F401 - it registers the models that TasksManager knows
    from optimum.exporters.tasks import TasksManager

    try:
        known = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
    except KeyError:
        raise Refused(
            f"optimum does not know models of type '{model_type}'. Export it to one .onnx file yourself and pass that."
        ) from None
    if task not in known:
        raise Refused(
            f"optimum does not export models of type '{model_type}' for {task.removesuffix('-with-past')}, only for "
            f"{', '.join(sorted(name for name in known if name in TASKS))}."
        )


def trace(model: Any, folder: Path, *, task: str, opset: int | None) -> None:
    """Write the model's graph and configs into the folder."""
    from optimum.exporters.onnx import onnx_export_from_model

    name = type(model).__name__
    kind = _encoder_config if is_encoder_alone(name) else _projected_config if is_projected(name) else None
    mine = {"model": kind(model.config)} if kind else None
    with _as_models_are():
        onnx_export_from_model(
            model, output=folder, task=task, opset=opset, do_validation=False, custom_onnx_configs=mine
        )


def _encoder_config(config: Any) -> Any:
    """Inputs and outputs of an encoder alone. optimum has only those of the encoder with its decoder."""
    from optimum.exporters.onnx.config import TextEncoderOnnxConfig
    from optimum.utils import NormalizedTextConfig

    sizes = {0: "batch_size", 1: "sequence_length"}

    class Encoder(TextEncoderOnnxConfig):  # type: ignore[misc]
        NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
        inputs = {"input_ids": sizes, "attention_mask": sizes}  # noqa: RUF012
        outputs = {"last_hidden_state": sizes}  # noqa: RUF012

    return Encoder(config, task="feature-extraction")


def _projected_config(config: Any) -> Any:
    """Inputs and outputs of a tower of images with its projection. optimum has only those of the tower."""
    from optimum.exporters.onnx.model_configs import CLIPVisionModelOnnxConfig

    class Projected(CLIPVisionModelOnnxConfig):  # type: ignore[misc]
        outputs = {name: {0: "batch_size"} for name in ("image_embeds", "last_hidden_state")}  # noqa: RUF012

    return Projected(config, task="feature-extraction")
