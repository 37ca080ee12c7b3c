"""`kvoffload`, the command."""

import os
import sys
from typing import NoReturn

import typer

from kvoffload.cli import output
from kvoffload.cli.bench import bench
from kvoffload.cli.clean import clean
from kvoffload.cli.doctor import doctor
from kvoffload.cli.inspect import inspect
from kvoffload.cli.serve import ServeCommand, serve
from kvoffload.cli.simulate import simulate
from kvoffload.cli.verify import verify
from kvoffload.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command(cls=ServeCommand, options_metavar="MODEL [OPTIONS] [OPTIONS OF VLLM SERVE]")(serve)
for command in (simulate, inspect, verify, clean, bench, doctor):
    app.command()(command)


@app.callback()
def about() -> None:
    """KV-cache offloading for vLLM: the server, and tools beside it."""


def main() -> None:
    """What users do wrong is one sentence and exit code 2, as typer does with a wrong option; what the system refuses is too."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a name may have characters that the terminal's encoding has not
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except UserError as error:
        _refuse(error)
    except OSError as error:  # of what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more to write what is left
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    if not isinstance(error, BrokenPipeError):  # of `| head`, who has seen enough
        print(f"kvoffload: {output.printable(error)}", file=sys.stderr)  # it may repeat what stands in a file
    sys.exit(2)
