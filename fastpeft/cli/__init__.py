"""The command line. `doctor` works from Python too, so nothing here needs the packages of `fastpeft[train]`."""

import sys


def main(arguments: list[str] | None = None) -> None:
    try:
        from fastpeft.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"fastpeft: error: the command line needs {error.name}: pip install 'fastpeft[train]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(arguments))
