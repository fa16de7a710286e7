"""The command `pipeload`: one module for each subcommand, with a function of the same name."""

from __future__ import annotations

import re
import signal
import sys
from inspect import cleandoc
from typing import Annotated, NoReturn

import typer

import pipeload
from pipeload.cli.commands import (
    answer,
    bench,
    catalog,
    chat,
    classify,
    cluster,
    convert,
    embed,
    export,
    fill_mask,
    generate,
    inspect,
    node,
    plan,
    profile,
    rerank,
    run,
    serve,
    timeline,
    verify,
    zero_shot,
)
from pipeload.cli.ending import INTERRUPTED, Commands, print_error
from pipeload.cli.loudness import LOUDNESS, Quiet, Verbose
from pipeload.errors import PipeloadError
from pipeload.foreign import shortage_in

__all__ = ["app", "main"]

app = typer.Typer(
    name="pipeload",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _unwrapped(text: str) -> str:
    """A docstring whose paragraphs are one line each, for the terminal to wrap; indented lines stay as they are."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", cleandoc(text))


for _command in (
    export.export,
    convert.convert,
    catalog.catalog,
    inspect.inspect,
    verify.verify,
    profile.profile,
    plan.plan,
    run.run,
    embed.embed,
    classify.classify,
    zero_shot.zero_shot,
    rerank.rerank,
    answer.answer,
    fill_mask.fill_mask,
    generate.generate,
    chat.chat,
    serve.serve,
    node.node,
    timeline.timeline,
    bench.bench,
):
    app.command(help=_unwrapped(_command.__doc__ or ""))(_command)

_cluster = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
for _part in (cluster.init, cluster.start, cluster.plan, cluster.status):
    _cluster.command(help=_unwrapped(_part.__doc__ or ""))(_part)
app.add_typer(_cluster, name="cluster", help="Several machines that run one model together.")


def main() -> None:
    """Run the command line.

    Exit codes: 0 done; 1 a PipeloadError, as one line on stderr, or a reader that closed the output; 2 wrong usage; 130
    Ctrl-C; 143 SIGTERM, which leaves no half-made files.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name="pipeload")
    except PipeloadError as error:
        print_error(error)
        sys.exit(1)
    except BrokenPipeError:
        raise
    except OSError as error:
        print_error(f"{error.filename or 'the output'} cannot be written or read: {error.strerror}.")
        sys.exit(1)
    except KeyboardInterrupt:
        print_error("interrupted.")
        sys.exit(INTERRUPTED)
    except (ImportError, MemoryError, RuntimeError) as error:
        if (shortage := shortage_in(error)) is None:
            raise
        print_error(f"the process cannot go on: {shortage}. Raise its limits (ulimit -a).")
        sys.exit(1)


def _terminate(number: int, _frame: object) -> NoReturn:
    # An exception, so that every owner of files and processes releases them.
    sys.exit(128 + number)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pipeload {pipeload.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run transformers larger than your RAM, on CPU, with ONNX Runtime."""
    LOUDNESS.set(quiet=quiet, verbose=verbose)
