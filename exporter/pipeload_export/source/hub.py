"""A model of the Hugging Face hub -> a local checkpoint folder, in the hub's own cache.

Only weights that hold no code are fetched (safetensors or GGUF, never a pickle), and of the small files only those
that a sharded model directory keeps or that a tokenizer is made from. The hub's library shows its own progress
bars, on a terminal only.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from pipeload.errors import ConfigError, ExportError
from pipeload_export.boundary import system_error
from pipeload_export.extra import require_modules
from pipeload_export.source.folder import choose_weights

__all__ = ["fetch_checkpoint"]

_SMALL = (".json", ".jinja", ".model", "vocab.txt", "merges.txt")
_TIMEOUT_S = 20
_OF_FILES = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EMFILE),
    }
)
"""Errors of folders and disks, never of connections."""


def fetch_checkpoint(name: str, revision: str | None, *, with_code: bool) -> tuple[Path, str]:
    """Download the files that an export needs. Without a network, take them from the hub's cache.

    Args:
        name: `owner/model`, or the name of one of the few models without an owner.
        revision: branch, tag or commit; None for the main branch.
        with_code: fetch the repository's Python files too.

    Returns:
        The folder, and the commit that it holds.

    Raises:
        ConfigError: there is no such model or revision, or it may not be read without an account's permission.
        ExportError: the hub cannot be reached, or failed.
    """
    require_modules("huggingface_hub")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import tqdm

    class TerminalBar(tqdm):  # type: ignore[misc]
        """The bar that counts files, which the library draws without a terminal too; unlike those of the files."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"disable": options.get("disable") or None}))

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        names = [file.rfilename for file in info.siblings or ()]
        wanted = _wanted(name, names, with_code=with_code)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, tqdm_class=TerminalBar))
    except HFValidationError as error:
        raise ConfigError(f"'{name}' is neither a path that exists nor the name of a model: {error}") from error
    except GatedRepoError as error:
        raise ConfigError(
            f"The model '{name}' is gated. Accept its conditions at https://huggingface.co/{name}, "
            "then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"The model '{name}' has no revision '{revision}'.") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"There is no path '{name}', and the hub has no model of that name that is open to you. Check the "
            "spelling, or log in with `hf auth login` if it is private."
        ) from error
    except HfHubHTTPError as error:
        raise ExportError(f"The hub failed on '{name}': {error}. Try again later.") from error
    except OSError as error:  # the library's errors of connection, and of writing its cache, are all of this kind
        if error.errno in _OF_FILES:
            raise system_error(f"The model '{name}' cannot be stored in the hub's cache", error, _cache()) from error
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ExportError(
                f"The model '{name}' is not in the hub's cache, and the hub cannot be reached: "
                f"{_reason(error)}. Connect to a network, or pass a local folder or .onnx file."
            ) from error
    return folder, folder.name


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _wanted(name: str, names: list[str], *, with_code: bool) -> list[str]:
    top = [file for file in names if "/" not in file]
    endings = (*_SMALL, ".py") if with_code else _SMALL
    # One folder deep lie the settings and weights of sentence-transformers' modules.
    settings = [file for file in names if re.fullmatch(r"[^/]+/config\.json|[1-9]\d*_[^/]+/model\.safetensors", file)]
    return [*settings, *(file for file in top if file.endswith(endings)), *choose_weights(top, f"The model '{name}'")]


def _reason(error: OSError) -> str:
    text = str(error)
    return "its name cannot be resolved" if "resol" in text else text.partition("Caused by")[2][:200] or text[:200]
