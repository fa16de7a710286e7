"""The settings that a model brings along."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tests.fuzz.mutations import json_of
from tests.fuzz.target import Target, Trial, Wrong

from pipeload.format.manifest import Manifest, TensorSpec
from pipeload.storage.model_files import ModelFiles
from pipeload.tasks.generate.options import generation_settings, warn_of_unused
from pipeload.tasks.images import ImageProcessor, image_sizes
from pipeload.tasks.model_files import ModelConfig, read_config, read_generation_config

__all__ = ["InMemory"]

_MANIFEST = Manifest(
    exporter="fuzz", source="", model_type="", task="image-classification", edges=(), outputs=(), shards=(), files=(),
    inputs=(TensorSpec(name="pixel_values", dtype="float32", shape=("batch", "channels", "height", "width")),),
    structures={},
)  # fmt: skip

_GENERATION = (
    {"max_length": 20, "max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9,
     "eos_token_id": [1, 2], "repetition_penalty": 1.1, "_from_model_config": True, "transformers_version": "4.57.6"},
    {"min_new_tokens": 1, "min_p": 0.1, "stop_strings": ["x"], "no_repeat_ngram_size": 2, "eos_token_id": 1,
     "num_beams": 4, "prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 3, "num_assistant_tokens": 4},
)  # fmt: skip
_CONFIG = (
    {"model_type": "roberta", "id2label": {"0": "no", "1": "yes"}, "vocab_size": 10, "max_position_embeddings": 514,
     "pad_token_id": 1, "eos_token_id": 2, "problem_type": "single_label_classification"},
    {"model_type": "vit", "image_size": [16, 24], "num_channels": 3, "id2label": ["a", "b"], "rope_scaling": None,
     "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
    {"model_type": "phi3", "original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
     "rope_scaling": {"type": "longrope", "short_factor": [1.0]}, "pad_token_id": [0]},
    {"image_size": {"height": 3, "width": 5}, "n_positions": 1024},
)  # fmt: skip
_PREPROCESSOR = (
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 12}, "do_resize": True, "resample": 2,
     "do_rescale": True, "rescale_factor": 0.00392, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5],
     "image_std": [0.5, 0.5, 0.5]},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 8, "crop_size": {"height": 6, "width": 6},
     "do_center_crop": True, "image_mean": 0.5, "image_std": 0.25, "resample": 3},
    {"image_processor_type": "DeiTImageProcessor", "size": {"shortest_edge": 9}, "crop_size": [5, 7]},
)  # fmt: skip


class InMemory(ModelFiles):
    """The files of a model directory that is nowhere but in memory."""

    def __init__(self, files: dict[str, bytes], manifest: Manifest = _MANIFEST) -> None:
        self.records = {}
        self._contents = files
        self.manifest = manifest

    def read(self, name: str, *, most_bytes: int = 16 << 20) -> bytes | None:
        """The content of a file."""
        return self._contents.get(name)

    def path(self, name: str) -> Path:
        """The path of a file."""
        return Path("/fuzz") / PurePosixPath(name)


def _prepare_generation() -> Trial:
    import warnings

    warnings.simplefilter("ignore")

    def trial(data: bytes) -> bool:
        written = read_generation_config(InMemory({"generation_config.json": data}))
        given: dict[str, Any] = json.loads(data.decode(errors="replace"))
        for name in ("max_length", "temperature", "top_k", "eos_token_id", "stop_strings"):
            if name in given and getattr(written, name) not in (given[name], _as_float(given[name])):
                raise Wrong("a setting is not the file's", f"{name}: {getattr(written, name)!r}, {given[name]!r}")
        settings = generation_settings(written, {})
        warn_of_unused(settings, {})
        limit = settings.token_limit
        if limit < 1 or (settings.min_new_tokens or 0) > limit:
            raise Wrong("it may make no token", limit)
        return True

    return trial


def _as_float(number: Any) -> Any:
    return float(number) if isinstance(number, int) and abs(number) < 1 << 1000 else number


def _prepare_config() -> Trial:
    def trial(data: bytes) -> bool:
        files = InMemory({"config.json": data})
        config = read_config(files)
        for use in (
            lambda: config.max_positions,
            lambda: config.image_height_width,
            lambda: config.label(1),
            lambda: config.pair_activation,
            lambda: image_sizes(files, _MANIFEST),
        ):
            found = use()
            if isinstance(found, float):
                raise Wrong("a whole number is none", found)
        return True

    return trial


def _prepare_preprocessor() -> Trial:
    image = np.arange(7 * 5 * 3, dtype=np.uint8).reshape(7, 5, 3)

    def trial(data: bytes) -> bool:
        values = ImageProcessor(InMemory({"preprocessor_config.json": data}), ModelConfig()).batch([image])
        if values.dtype != np.float32 or values.ndim != 4 or values.shape[:2] != (1, 3) or 0 in values.shape:
            raise Wrong("an image becomes no pixel values", f"{values.dtype} {list(values.shape)}")
        return True

    return trial


def _texts(given: Any) -> list[bytes]:
    return [json.dumps(one).encode() for one in given]


TARGETS = (
    Target(
        name="generation_config", what="`generation_config.json`", prepare=_prepare_generation, mutate=json_of,
        seeds=lambda: _texts(_GENERATION),
    ),
    Target(
        name="config", what="`config.json`", prepare=_prepare_config, mutate=json_of, seeds=lambda: _texts(_CONFIG)
    ),
    Target(
        name="preprocessor_config", what="`preprocessor_config.json`", prepare=_prepare_preprocessor, mutate=json_of,
        seeds=lambda: _texts(_PREPROCESSOR), native=True, memory_bytes=1 << 30, limit_s=20,
    ),
)  # fmt: skip
