"""`pipeload cluster`: certificates, the scheduler, where a model would run, and which nodes there are."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeload.cli.commands.node import Certificates, tell
from pipeload.cli.options import Json
from pipeload.cli.report import print_json, table
from pipeload.cluster.connecting import connect, missing_package
from pipeload.format.manifest import Manifest
from pipeload.machine.sizes import format_bytes

__all__ = ["init", "plan", "start", "status"]

_SHOWN_CHANGES = 10
_SLOWER = 1.25
"""A factor below that is the usual swing."""
_SENDS_SLOWER = 2.0
"""Likewise, of messages."""

Address = Annotated[
    str, typer.Option("--cluster", metavar="ADDRESS", help="The cluster's address, such as tls://10.0.0.1:8786.")
]


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Gets the certificates; made if it is missing.")],
) -> None:
    """Make a CA, and certificates for the scheduler, the nodes and the clients of a cluster.

    Copy ca.pem and node*.pem to the nodes, ca.pem and client*.pem to the clients. A holder of any of these keys may run
    any code on all machines of the cluster. Keep ca-key.pem where nothing else runs: it makes more of them.

    Examples:
        pipeload cluster init certificates
    """
    try:
        from pipeload.cluster.certificates import make_certificates

        files = make_certificates(directory)
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    for file in files:
        typer.echo(str(file))


def start(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 8786,
    certificates: Certificates = None,
) -> None:
    """Run the scheduler of a cluster, which knows its nodes. It runs no model.

    Prints its address. Without --certificates it listens on loopback only. Ends at Ctrl-C or SIGTERM.

    Examples:
        pipeload cluster start --host 0.0.0.0 --certificates certificates

        pipeload cluster start --port 0
    """
    try:
        from pipeload.cluster.scheduler import start as start_scheduler
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    start_scheduler(host, port, certificates, tell)


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model's name on the nodes, or its directory here.")
    ],
    cluster: Address,
    certificates: Certificates = None,
    throughput: Annotated[
        bool,
        typer.Option("--throughput", help="Place for the most passes a second, not for the shortest time of one."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show which node would run which shards of a model, and predict how fast. Nothing is opened.

    For a decoder the predictions are for one token. A model that does not fit is an error, which names the smallest
    budget of a node that works.

    Examples:
        pipeload cluster plan bert-large --cluster tls://10.0.0.1:8786 --certificates certificates
    """
    with connect(cluster, certificates) as connection:
        found = connection.plan(model, latency_share=0.0 if throughput else 1.0)
        manifest = connection.manifest(model)
    facts = placement_facts(manifest, found)
    if as_json:
        print_json(facts)
        return
    rows = [("node", "shards", "computing", "reading", "sending")]
    rows += [
        (one["node"], one["shards"], *(f"{one[key] * 1000:.1f} ms" for key in ("run_s", "read_s", "send_s")))
        for one in facts["stages"]
    ]
    typer.echo(table(rows))
    typer.echo(f"predicted latency of a pass: {facts['latency_s'] * 1000:.1f} ms")
    typer.echo(f"predicted throughput: {facts['passes_per_s']:.1f} passes/s, with enough of them at the same time")


def status(cluster: Address, certificates: Certificates = None, as_json: Json = False) -> None:
    """List the nodes of a cluster, their models, and the stages that are open on them.

    Of each node the memory that it may use now, of each stage its calls, and the seconds of its latest pass. Below, the
    latest ten times that a model moved to other nodes, and why.

    Examples:
        pipeload cluster status --cluster tls://10.0.0.1:8786 --certificates certificates
    """
    with connect(cluster, certificates) as connection:
        nodes, changes = connection.nodes(), connection.reconfigurations()
    if as_json:
        print_json({"nodes": nodes, "reconfigurations": changes})
        return
    if not nodes:
        typer.echo("no node; start one with `pipeload node`")
        return
    rows = [("node", "address", "budget", "trusted", "models", "open stages")]
    rows += [
        (
            one.offer.name,
            one.address,
            _budget(one),
            "yes" if one.offer.trusted else "no",
            _models(one.offer),
            "; ".join(map(_stage, one.stages)) or "none",
        )
        for one in nodes
    ]
    typer.echo(table(rows))
    for change in changes[-_SHOWN_CHANGES:]:
        typer.echo(_change(change))


def _change(change: Any) -> str:
    at = datetime.fromtimestamp(change.at_s).astimezone().isoformat(sep=" ", timespec="seconds")
    moved = f"moved from {change.before} to {change.after}" if change.after else f"stays on {change.before}"
    return f"{at} {change.model}: {change.why} It {moved}; calls waited {change.waited_s:.1f} s."


def _budget(node: Any) -> str:
    whole = format_bytes(node.offer.budget_bytes)
    return whole if node.budget_bytes >= node.offer.budget_bytes else f"{format_bytes(node.budget_bytes)} of {whole}"


def _stage(facts: dict[str, Any]) -> str:
    slower, sending = max(facts["slowness"] or (1.0,)), max(facts["links"].values(), default=1.0)
    return (
        f"{facts['model']} {facts['shards']}, {facts['calls']} calls, {facts['waiting']} now, computing "
        f"{facts['run_s'] * 1000:.1f} ms, reading {facts['read_s'] * 1000:.1f} ms"
        + (f", {slower:.1f} times slower than at its best" if slower > _SLOWER else "")
        + (f", sending {sending:.1f} times slower than at its best" if sending > _SENDS_SLOWER else "")
        + (f", {facts['cores']}" if "cores" in facts else "")
    )


def _models(offer: Any) -> str:
    found = sorted(offer.models)
    if offer.fetched_bytes:
        found.append(f"others by up to {format_bytes(offer.fetched_bytes)} of fetched shards")
    return ", ".join(found)


def placement_facts(manifest: Manifest, found: Any) -> dict[str, Any]:
    """A placement and its predictions as plain values."""
    names = [shard.name for shard in manifest.shards]
    return {
        "stages": [
            {
                "node": one.node,
                "shards": f"{names[one.begin]}:{names[one.end - 1]}",
                "run_s": one.run_s,
                "read_s": one.read_s,
                "send_s": one.send_s,
            }
            for one in found.segments
        ],
        "latency_s": found.latency_s,
        "passes_per_s": 1 / found.period_s,
    }
