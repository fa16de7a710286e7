from __future__ import annotations

from pathlib import Path

import pytest
from tests.shared import folder_of_the_run, made_by_one


def _package_folder(name: str) -> tuple[Path, str]:
    """Where the files of a model of the catalog are, and which of them is the model."""
    catalog = pytest.importorskip("pipeload_export.source.catalog")
    errors = pytest.importorskip("pipeload.errors")
    recipe = catalog.recipe(name)
    try:
        return catalog.fetch_package(recipe.package), recipe.model
    except errors.ExportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The checkpoint folder of all-MiniLM-L6-v2."""
    folder, model = _package_folder("minilm")
    return folder / model


@pytest.fixture(scope="session")
def smollm2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of SmolLM2-135M, as transformers takes it out of the GGUF file."""
    transformers = pytest.importorskip("transformers")
    folder, model = _package_folder("smollm2-135m")
    path = folder / model

    def write(target: Path) -> None:
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)
        # Nothing but a copy of the GGUF file.
        (target / "tokenizer.model").unlink(missing_ok=True)

    return made_by_one(folder_of_the_run(tmp_path_factory) / "smollm2", write)
