"""`kvoffload`, the command."""

import sys

import typer

from kvoffload.cli.bench import bench
from kvoffload.cli.clean import clean
from kvoffload.cli.inspect import inspect
from kvoffload.cli.simulate import simulate
from kvoffload.cli.verify import verify
from kvoffload.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (simulate, inspect, verify, clean, bench):
    app.command()(command)


@app.callback()
def about() -> None:
    """KV-cache offloading for vLLM: tools beside the server."""


def main() -> None:
    """What users do wrong is one sentence and exit code 2, as typer does with a wrong option."""
    try:
        app()
    except UserError as error:
        print(f"kvoffload: {error}", file=sys.stderr)
        sys.exit(2)
