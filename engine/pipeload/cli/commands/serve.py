"""`pipeload serve`: models over HTTP."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeload.cli.commands.node import Certificates
from pipeload.cli.loudness import LOUDNESS
from pipeload.cli.options import Budget, pairs
from pipeload.cli.terminal import say
from pipeload.errors import ConfigError
from pipeload.machine.files import read_file

if TYPE_CHECKING:
    from pipeload.serve.settings import Settings

__all__ = ["serve"]

_KEYS_BYTES = 64 << 10
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def serve(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DIR...",
            help="Sharded model directories, as `pipeload export` makes them; with --cluster names of models on its "
            "nodes, or none for all of them.",
            show_default=False,
        ),
    ] = None,
    budget: Budget = "auto",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 8080,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with one API key a line; a request must have one.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let other machines in without a key, on a --host that they reach.")
    ] = False,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="Another name for a model, by its directory, with --cluster by its name; may be given several times.",
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", min=1, max=1024, help="Calls that are served or wait; more are refused.")
    ] = 32,
    idle: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Close a model after this time without a call, such as 60s or 5m."),
    ] = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="The most that each model keeps of KV caches of ended texts, such as 64MB, for requests that begin as "
            "they do; 0 for none. Without it a quarter of the budget. Weights never leave memory for them.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web origin whose pages may call, or *; may be given several times."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Serve models that run on the nodes of this cluster, not here."),
    ] = None,
    certificates: Certificates = None,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="The form of the log on stderr.")] = "text",
) -> None:
    """Serve models over HTTP, with OpenAI's interface.

    Prints its address. Other machines reach it only with --host, and then with an API key, or --no-auth. Ends at
    Ctrl-C or SIGTERM, when the calls have their answers, after at most 20 s. docs/serving.md lists routes and fields.

    Examples:
        pipeload serve models/exported/minilm --budget 200MB --idle 60s

        pipeload serve models/exported/smollm2-135m --alias gpt-4o-mini=models/exported/smollm2-135m --port 8000

        pipeload serve models/exported/minilm --host 0.0.0.0 --api-key-file keys.txt --log-format json

        pipeload serve --cluster tls://10.0.0.1:8786 --certificates certificates
    """
    from pipeload.machine.sizes import parse_budget, parse_bytes

    parse_budget(budget)
    try:
        from pipeload.serve.server import serve as serve_models
        from pipeload.serve.settings import Settings
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pipeload"):
            raise
        raise ConfigError(
            f"The server needs the package {error.name}: pip install starlette uvicorn prometheus-client."
        ) from error
    given = directories or []
    _check_models(given, cluster, prefix_cache)
    named = _named(given)
    aliases = pairs(alias, "--alias")
    settings = Settings(
        directories={} if cluster else named,
        aliases=aliases if cluster else _aliases(aliases, named),
        budget=budget,
        host=host,
        port=port,
        keys=_keys(api_key_file),
        max_waiting=max_waiting,
        idle_s=None if idle is None else _seconds(idle),
        prefix_cache_bytes=None if prefix_cache is None else 0 if prefix_cache == "0" else parse_bytes(prefix_cache),
        cors_origins=tuple(cors_origin or ()),
        log_format=None if LOUDNESS.quiet else log_format,
        cluster=cluster,
        certificates=certificates if cluster else None,
        names=tuple(map(str, given)) if cluster else (),
    )
    _check_door(settings, no_auth=no_auth)
    serve_models(settings, _tell, replaceable=True)


def _tell(address: str) -> None:
    say(address)
    sys.stdout.flush()


def _check_door(settings: Settings, *, no_auth: bool) -> None:
    """Raise typer.BadParameter if other machines could call without anyone having meant it."""
    from pipeload.serve.settings import is_loopback

    if no_auth and settings.keys:
        raise typer.BadParameter("--no-auth and --api-key-file are both given. Leave one of them out.")
    if not (is_loopback(settings.host) or settings.keys or no_auth):
        raise typer.BadParameter(
            f"Other machines reach --host {settings.host}: give --api-key-file, or say --no-auth to let them all in."
        )


def _check_models(given: list[Path], cluster: str | None, prefix_cache: str | None) -> None:
    """Raise typer.BadParameter if there is nothing to serve, or an option is not for the models of a cluster."""
    if cluster is None and not given:
        raise typer.BadParameter("Name a sharded model directory, or a cluster with --cluster.")
    if cluster is not None and prefix_cache is not None:
        raise typer.BadParameter("--prefix-cache is for models of this machine: nodes keep no caches of ended texts.")


def _named(directories: list[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for directory in directories:
        name = directory.resolve().name
        if name in named:
            raise typer.BadParameter(f"Two models have the name {name}. Rename one of their directories.")
        named[name] = directory
    return named


def _aliases(given: dict[str, str], named: dict[str, Path]) -> dict[str, str]:
    places = {directory.resolve(): name for name, directory in named.items()}
    aliases = {}
    for name, directory in given.items():
        if (known := places.get(Path(directory).resolve())) is None:
            raise typer.BadParameter(f"--alias {name} names {directory}, which is none of the models to serve.")
        if name in named:
            raise typer.BadParameter(f"--alias {name} is the name of a model already.")
        aliases[name] = known
    return aliases


def _keys(file: Path | None) -> tuple[bytes, ...]:
    """The keys in a file, one a line."""
    if file is None:
        return ()
    keys = tuple(line.strip() for line in read_file(file, most_bytes=_KEYS_BYTES).splitlines() if line.strip())
    if not keys:
        raise typer.BadParameter(f"{file} has no API key. Write one a line.")
    return keys


def _seconds(text: str) -> float:
    found = _DURATION.fullmatch(text.strip())
    if not found:
        raise typer.BadParameter(f"--idle is '{text}'; write a time, such as 60s, 5m or 1h.")
    return float(found[1]) * _UNITS[found[2] or "s"]
