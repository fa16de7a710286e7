from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.tasks.fakes import files_in, write_json

from pipeload.errors import ShardError
from pipeload.tasks.model_files import ModelConfig, read_settings


def test_fields_that_no_task_uses_may_be_anything(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"vocab_size": 7, "rope_scaling": {"type": [1]}, "id2label": {"1": "yes"}})
    config = read_settings(files_in(tmp_path), "config.json", ModelConfig)
    assert config.vocab_size == 7
    assert (config.label(1), config.label(0)) == ("yes", "LABEL_0")


def test_a_missing_file_means_defaults(tmp_path: Path) -> None:
    assert read_settings(files_in(tmp_path), "config.json", ModelConfig) == ModelConfig()


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (ModelConfig(model_type="bert", max_position_embeddings=512, pad_token_id=0), 512),
        (ModelConfig(model_type="roberta", max_position_embeddings=514, pad_token_id=1), 512),
        (ModelConfig(model_type="roberta", max_position_embeddings=514), 512),
        (ModelConfig(model_type="gpt2", n_positions=1024), 1024),
        (
            ModelConfig(
                max_position_embeddings=131072, original_max_position_embeddings=4096, rope_scaling={"type": "longrope"}
            ),
            4096,
        ),
        (
            ModelConfig(
                max_position_embeddings=131072,
                rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 4096},
            ),
            4096,
        ),
        (ModelConfig(max_position_embeddings=2048, rope_scaling="odd"), 2048),
        (ModelConfig(), None),
    ],
)
def test_the_number_of_positions(config: ModelConfig, positions: int | None) -> None:
    assert config.max_positions == positions


@pytest.mark.parametrize(("size", "expected"), [(384, (384, 384)), ([224, 448], (224, 448)), (None, None)])
def test_the_image_size(size: int | list[int] | None, expected: tuple[int, int] | None) -> None:
    assert ModelConfig(image_size=size).image_height_width == expected


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"vocab_size": "many"}', b"[]", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"config\.json is damaged"):
        read_settings(files_in(tmp_path), "config.json", ModelConfig)


def test_a_file_outside_the_directory_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    write_json(tmp_path, "secret.json", {"vocab_size": 7})
    (inside / "config.json").symlink_to(tmp_path / "secret.json")
    for name in ("config.json", "../secret.json", str(tmp_path / "secret.json")):
        with pytest.raises(ShardError, match="leads out of the model directory"):
            read_settings(files_in(inside), name, ModelConfig)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ShardError, match=r"config\.json' cannot be read"):
        read_settings(files_in(tmp_path), "config.json", ModelConfig)
