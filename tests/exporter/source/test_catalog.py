"""The catalog is complete, and only pinned files get out of a package."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import pytest
from tests.exporter.models import write_json, write_onnx
from tests.models import traced_here

from pipeload.errors import ConfigError, ExportError
from pipeload.format.manifest import read
from pipeload_export import export
from pipeload_export.source import catalog
from pipeload_export.source.catalog import (
    Package,
    PackageRecipe,
    SeededRecipe,
    cache_folder,
    fetch_package,
    recipe,
    recipes,
)
from pipeload_export.source.sources import Checkpoint, Unsplit, find_source
from pipeload_export.source.task import TASKS

NAME, VERSION = "pipeload-test-weights", "1.2"
INSIDE = "weights/model.onnx"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELOAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip finds packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def package(index: Path, tmp_path: Path) -> Package:
    """A package with a model, in the index."""
    model = write_onnx(tmp_path / "model.onnx")
    info = f"pipeload_test_weights-{VERSION}.dist-info"
    wheel = index / f"pipeload_test_weights-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, INSIDE)
        archive.writestr("weights/__init__.py", "raise SystemExit('code of the package was run')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Package(name=NAME, version=VERSION, wheel_sha256=sha256(wheel), files_sha256={INSIDE: sha256(model)})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class TestRecipes:
    def test_are_those_that_the_readme_lists(self) -> None:
        readme = Path(__file__).parents[3] / "models" / "README.md"
        listed = re.findall(r"^\| `([a-z0-9-]+)` \|", readme.read_text(), re.MULTILINE)
        assert listed == list(recipes())

    @pytest.mark.parametrize("name", list(recipes()))
    def test_say_where_from_and_under_which_licence(self, name: str) -> None:
        found = recipe(name)
        assert found.task in TASKS
        assert found.about
        assert found.licence
        if isinstance(found, PackageRecipe):
            hashes = [found.package.wheel_sha256, *found.package.files_sha256.values()]
            assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes)
            assert any(path.startswith(found.model) for path in found.package.files_sha256)
            assert re.fullmatch(r"[\d.]+", found.package.version)
            if found.side_files:
                assert isinstance(recipe(found.side_files), PackageRecipe)

    @pytest.mark.parametrize("name", [n for n, r in recipes().items() if isinstance(r, SeededRecipe)])
    def test_seeded_shapes_have_the_parameters_that_they_say(self, name: str) -> None:
        import torch
        import transformers

        found = recipe(name)
        assert isinstance(found, SeededRecipe)
        config = getattr(transformers, found.model.config_class)(**found.model.config)
        with torch.device("meta"):
            model = getattr(transformers, found.model.model_class)(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == found.parameters

    def test_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(ConfigError, match=r"no model 'x'\. It has: minilm, minilm-int8, smollm2-135m, bert-large"):
            recipe("x")

    def test_damaged_catalog(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "catalog.toml"
        monkeypatch.setattr(catalog, "_INSTALLED", path)
        for text in ("no toml", "[a]\nkind = 'package'", "[a]\nkind = 'elsewhere'"):
            path.write_text(text)
            with pytest.raises(ExportError, match="cannot be read"):
                recipes()


class TestFetch:
    def test_takes_only_the_pinned_files(self, package: Package) -> None:
        folder = fetch_package(package)
        assert folder == cache_folder() / f"{NAME}-{VERSION}"
        assert [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] == [INSIDE]
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_happens_once(self, package: Package, index: Path) -> None:
        fetch_package(package)
        shutil.rmtree(index)
        fetch_package(package)

    @pytest.mark.slow
    def test_happens_again_for_a_damaged_file(self, package: Package, index: Path) -> None:
        path = fetch_package(package) / INSIDE
        path.write_bytes(b"damaged")
        assert sha256(fetch_package(package) / INSIDE) == package.files_sha256[INSIDE]
        path.unlink()
        assert sha256(fetch_package(package) / INSIDE) == package.files_sha256[INSIDE]

    def test_refuses_another_wheel(self, package: Package) -> None:
        other = Package(name=NAME, version=VERSION, wheel_sha256="0" * 64, files_sha256=package.files_sha256)
        with pytest.raises(ExportError, match=r"has the sha256 .* the recipe says 0000"):
            fetch_package(other)
        assert list(cache_folder().iterdir()) == []

    def test_refuses_another_file(self, package: Package) -> None:
        other = Package(name=NAME, version=VERSION, wheel_sha256=package.wheel_sha256, files_sha256={INSIDE: "0" * 64})
        with pytest.raises(ExportError, match=f"not the package of the recipe: {INSIDE} has another sha256"):
            fetch_package(other)

    def test_says_why_pip_failed(self, index: Path) -> None:
        absent = Package(name="pipeload-test-absent", version="1", wheel_sha256="", files_sha256={})
        with pytest.raises(ExportError, match="could not fetch pipeload-test-absent==1: No matching distribution"):
            fetch_package(absent)

    def test_needs_pip(self, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(catalog, "has_module", lambda _: False)
        with pytest.raises(ExportError, match="ensurepip"):
            fetch_package(Package(name=NAME, version=VERSION, wheel_sha256="", files_sha256={}))

    def test_goes_where_the_user_keeps_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cache_folder() == tmp_path / "cache" / "packages"
        monkeypatch.delenv("PIPELOAD_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "xdg" / "pipeload" / "packages"

    def test_a_user_without_a_home_is_told_where_to_set_one(
        self, package: Package, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("PIPELOAD_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)  # in no list of users
        with pytest.raises(ExportError, match=r"this user has no home\. Set PIPELOAD_CACHE"):
            fetch_package(package)

    def test_what_a_killed_fetch_left_is_removed_by_the_next(self, package: Package) -> None:
        code = (
            "import os, sys, msgspec\nfrom pipeload_export.source import catalog\n"
            "catalog.subprocess.run = lambda *_, **__: os.kill(os.getpid(), 9)\n"
            "catalog.fetch_package(msgspec.json.decode(sys.argv[1], type=catalog.Package))\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code, msgspec.json.encode(package)], env=environment, check=False)
        assert done.returncode == -9
        folder = fetch_package(package)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_cache_that_cannot_be_written(self, package: Package, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file in the way")
        with pytest.raises(ExportError, match=r"cannot be stored in .* or set PIPELOAD_CACHE"):
            fetch_package(package)


class TestSource:
    def test_package_with_an_onnx_file(self, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = PackageRecipe(about="", licence="", task="feature-extraction", package=package, model=INSIDE)
        monkeypatch.setattr(catalog, "recipes", lambda: {"toy": found})
        export("catalog:toy", tmp_path / "target")
        manifest = read(tmp_path / "target")
        assert (manifest.source, manifest.task) == ("catalog:toy", "feature-extraction")

    def test_side_files_of_another_recipe(
        self, package: Package, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = write_json(tmp_path / "config.json", {"model_type": "toy"})
        folder = cache_folder() / "other-1" / "files"
        folder.mkdir(parents=True)
        shutil.copy(config, folder)
        other = Package(name="other", version="1", wheel_sha256="", files_sha256={"files/config.json": sha256(config)})
        common = {"about": "", "licence": "", "task": "fill-mask"}
        monkeypatch.setattr(
            catalog,
            "recipes",
            lambda: {
                "toy": PackageRecipe(**common, package=package, model=INSIDE, side_files="other"),
                "other": PackageRecipe(**common, package=other, model="files"),
            },
        )
        found = find_source("catalog:toy", progress=lambda *_: None)
        assert isinstance(found, Unsplit)
        assert (found.model_type, set(found.side_files)) == ("toy", {"config.json"})

    def test_seeded_model_fetches_nothing(self, index: Path) -> None:
        found = find_source("catalog:vit-large", progress=lambda *_: None)
        assert isinstance(found, Checkpoint)
        assert found.request.weight_bytes == 304_326_632 * 4
        assert found.side_json["preprocessor_config.json"]["size"] == {"height": 224, "width": 224}
        assert not cache_folder().exists()

    @pytest.mark.slow
    def test_seeded_model_is_the_same_every_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import msgspec

        large = recipe("bert-large")
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        assert isinstance(large, SeededRecipe)
        model = msgspec.structs.replace(large.model, config={**small, "vocab_size": 100})
        toy = msgspec.structs.replace(large, model=model, parameters=30_000)
        monkeypatch.setattr(catalog, "recipes", lambda: {"toy": toy})
        with traced_here():
            one, two = (export("catalog:toy", tmp_path / name) for name in ("one", "two"))
        assert one.files == two.files

    def test_seeded_model_has_one_task(self) -> None:
        with pytest.raises(ConfigError, match="made for feature-extraction"):
            find_source("catalog:bert-large", task="fill-mask", progress=lambda *_: None)

    def test_takes_no_revision(self) -> None:
        with pytest.raises(ConfigError, match="revision"):
            find_source("catalog:minilm", revision="main", progress=lambda *_: None)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("name", "blocks"), [("minilm", 6), ("minilm-int8", 6)])
def test_real_model(name: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELOAD_CACHE")
    manifest = export(f"catalog:{name}", tmp_path / name)
    assert [shard.role for shard in manifest.shards].count("block") == blocks
    assert {"config.json", "tokenizer.json"} <= {record.path for record in manifest.files}
    assert all(result.max_rel_error <= 1e-4 for result in manifest.verification)
