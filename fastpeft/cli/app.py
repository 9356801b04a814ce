"""The commands. They import torch and friends inside their functions, so that `--help` answers at once."""

import os
import sys
from typing import Annotated

import typer

from fastpeft.cli import compare, doctor, finetune, recommend
from fastpeft.cli.errors import BadInput

# typer carries its own copy of click, or uses the installed one, depending on its version; this is the class in both.
UsageError = typer.BadParameter.__base__
INTERRUPTED = 130  # what a shell calls the end by Ctrl-C

app = typer.Typer(
    name="fastpeft",
    help="Parameter-efficient fine-tuning at the speed of the frozen model.",
    no_args_is_help=True,
    add_completion=False,
)
app.command("finetune")(finetune.command)
app.command("compare")(compare.command)
app.command("recommend")(recommend.command)
app.command("doctor")(doctor.command)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastpeft {doctor.version('fastpeft')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def fail(message: str) -> int:
    # Every rank of a distributed run meets the same bad input; one of them says so.
    if os.environ.get("RANK", "0") == "0":
        print(f"fastpeft: error: {message}", file=sys.stderr)
    return 2


def run(arguments: list[str] | None) -> int:
    """Returns the exit code."""
    try:
        code = app(arguments, standalone_mode=False)
    except BadInput as error:
        return fail(str(error))
    except UsageError as error:
        return fail(error.format_message())
    except typer.Abort:
        code = INTERRUPTED
    if code == INTERRUPTED:  # typer's newer versions return it
        print("fastpeft: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0
