"""`pipeload node`: this machine as a node of a cluster."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeload.cli.options import Budget
from pipeload.cluster.connecting import missing_package
from pipeload.machine.sizes import parse_bytes

__all__ = ["Certificates", "node", "tell"]

Certificates = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="PIPELOAD_CERTIFICATES",
        help="The certificates of `pipeload cluster init`, for a tls:// address.",
    ),
]


def node(
    cluster: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="The cluster's address, as `pipeload cluster start` has printed it."),
    ],
    models: Annotated[
        Path, typer.Option(metavar="DIR", help="A directory with this node's sharded model directories.")
    ],
    budget: Budget = "auto",
    name: Annotated[str | None, typer.Option(help="The node's name; else the machine's.")] = None,
    certificates: Certificates = None,
    host: Annotated[
        str | None, typer.Option(help="The address to listen on; else the one by which the cluster is reached.")
    ] = None,
    fetch: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Take shards of models that are not here from other nodes, into .fetched in --models, which may take "
            "this much disk, such as 4GB.",
        ),
    ] = None,
    untrusted: Annotated[
        bool,
        typer.Option("--untrusted", help="Never run a model's first and last shards, which see texts and answers."),
    ] = False,
) -> None:
    """Run a node of a cluster: it keeps its memory budget, and runs parts of the models that it has.

    Prints its address. Ends at Ctrl-C or SIGTERM. Every program with a certificate of the cluster may run any code
    here; docs/cluster.md says more.

    Examples:
        pipeload node --cluster tls://10.0.0.1:8786 --budget 512MB --models /srv/models --certificates certificates

        pipeload node --cluster tls://10.0.0.1:8786 --budget 2GB --models /srv/models --fetch 8GB
    """
    try:
        from pipeload.cluster.node import start
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    start(
        cluster,
        models,
        budget,
        name=name or socket.gethostname(),
        host=host,
        certificates=certificates,
        trusted=not untrusted,
        fetched_bytes=0 if fetch is None else parse_bytes(fetch),
        tell=tell,
    )


def tell(address: str) -> None:
    """Print a line at once, for whatever waits for it."""
    typer.echo(address)
    sys.stdout.flush()
