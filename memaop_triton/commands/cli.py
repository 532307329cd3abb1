"""The command line `memaop-triton`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from memaop_triton import __version__
from memaop_triton.commands import benchmarks, cache, demo, machine, paper, planning, tuning
from memaop_triton.errors import CommandError

PROGRAM = "memaop-triton"

app = typer.Typer(add_completion=False, help="A cheaper backward pass for PyTorch.")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (
    demo.demo,
    paper.reproduce,
    planning.plan,
    tuning.tune,
    benchmarks.bench,
    machine.env,
):
    app.command()(_command)
app.add_typer(cache.app, name="cache", no_args_is_help=True)


# Where Typer keeps the base class of its usage errors differs between versions.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[
    typer.BadParameter.__mro__.index(Exception) - 1
]


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    For a wrong option, missing data or a missing package it prints one line on standard error and
    returns 2.
    """
    try:
        code: Any = app(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except _USAGE_ERROR as error:
        usage_error: Any = error
        message = usage_error.format_message()
    except CommandError as error:
        message = str(error)
    except (typer.Abort, KeyboardInterrupt):
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        return 130
    else:
        return code if isinstance(code, int) else 0
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main() -> None:
    """Entry point of the console command."""
    sys.exit(run(sys.argv[1:]))
