from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.tasks.fakes import files_in, write_json

from pipeload.errors import ConfigError, ShardError
from pipeload.tasks.model_files import ModelConfig, read_config, read_settings


def test_fields_that_no_task_uses_may_be_anything(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"vocab_size": 7, "rope_scaling": {"type": [1]}, "id2label": {"1": "yes"}})
    config = read_config(files_in(tmp_path))
    assert config.vocab_size == 7
    assert (config.label(1), config.label(0)) == ("yes", "LABEL_0")


def test_a_missing_file_means_defaults(tmp_path: Path) -> None:
    assert read_config(files_in(tmp_path)) == ModelConfig()


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


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ({"0": 5, "1": "b"}, ["5", "b"]),
        (["a", "b"], ["a", "b"]),
        (None, ["LABEL_0", "LABEL_1"]),
        ({}, ["LABEL_0", "LABEL_1"]),
    ],
)
def test_labels_in_odd_forms(tmp_path: Path, given: object, labels: list[str]) -> None:
    write_json(tmp_path, "config.json", {"id2label": given})
    config = read_config(files_in(tmp_path))
    assert [config.label(0), config.label(1)] == labels


def test_other_odd_forms(tmp_path: Path) -> None:
    write_json(tmp_path, "config.json", {"image_size": {"height": 3, "width": 4}, "pad_token_id": [7, 8]})
    config = read_config(files_in(tmp_path))
    assert (config.image_height_width, config.pad_token_id, config.odd) == ((3, 4), 7, ())


def test_a_value_that_cannot_be_used_stops_only_those_who_need_it(tmp_path: Path) -> None:
    odd = {"id2label": {"x": "y"}, "image_size": "large", "vocab_size": "many", "max_position_embeddings": {}}
    write_json(tmp_path, "config.json", {**odd, "model_type": "bert"})
    config = read_config(files_in(tmp_path))
    assert (config.model_type, set(config.odd)) == ("bert", set(odd))
    for need, name in (
        (lambda: config.label(0), "id2label"),
        (lambda: config.image_height_width, "image_size"),
        (lambda: config.max_positions, "max_position_embeddings"),
    ):
        with pytest.raises(ConfigError, match=f"This needs '{name}' of the model's config.json"):
            need()


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
