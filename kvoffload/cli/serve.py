"""`kvoffload serve`: vLLM's OpenAI server with kvoffload turned on. What is not ours goes to `vllm serve` as it is."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperCommand

from kvoffload.cli.drive import check_usable
from kvoffload.config import AUTOMATIC, Config
from kvoffload.errors import UserError
from kvoffload.vllm import window

# Not `vllm`, which only some builds of vLLM can run; -P, because a folder called vllm may lie in the working directory.
VLLM = (sys.executable, "-P", "-m", "kvoffload.vllm.command", "serve")
CONNECTOR = {
    "kv_connector": "KVOffloadConnector",
    "kv_connector_module_path": "kvoffload.vllm.connector",  # found also where VLLM_PLUGINS leaves our plugin out
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
SEED_SPELLING = "--disable-kv-cache-offload"  # of --disable-kv-cache, in scripts that started a server of the same switches


def _switch(name: str, says: str) -> Any:
    """A name of its own, or Typer would make a --no-... of it."""
    return typer.Option(name, metavar="", help=says)


class ServeCommand(TyperCommand):
    """Takes our options from among vLLM's, in either spelling, and leaves the rest in the context's `args` as it was.

    Typer's own parser would drop `--` and take `--help=all`, which is vLLM's, for a mistake.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        takes_value = {name: not option.is_flag for option in self.get_params(ctx) for name in option.opts}
        ours: list[str] = []
        theirs: list[str] = []
        rest = list(args)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                theirs += [argument, *rest]
                break
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            name = "--disable-kv-cache" if name == SEED_SPELLING else name
            if name not in takes_value or (name == "--help" and equals):
                theirs.append(argument)
            elif not takes_value[name]:
                if equals:
                    raise UserError(f"{name} is a switch and takes no value: leave out {equals + value!r}")
                ours.append(name)
            elif not equals and (not rest or rest[0].startswith("--")):
                raise UserError(f"{name} needs a value: write it behind the option ({name}=VALUE if it begins with dashes)")
            else:
                ours.append(f"{name}={value if equals else rest.pop(0)}")
        super().parse_args(ctx, ours)
        ctx.args = theirs
        return theirs


def serve(
    context: typer.Context,
    nvme_path: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Directory for the SSD tier; repeat it for several drives.")
    ] = None,
    dram_kv_offload_gb: Annotated[str | None, typer.Option(metavar="GB", help="Cap of the DRAM tier.")] = None,
    ssd_kv_offload_gb: Annotated[
        str | None, typer.Option(metavar="GB", help="Cap of the SSD tier; -1, the default: 80 % of what is free.")
    ] = None,
    ssd_admission: Annotated[str | None, typer.Option(metavar="WHICH", help="all; or second-touch: what is used twice.")] = None,
    ssd_write_gb_per_day: Annotated[str | None, typer.Option(metavar="GB", help="Budget of writes to the SSD.")] = None,
    resume_kv_cache: Annotated[bool, _switch("--resume-kv-cache", "Use what an earlier run left (default).")] = False,
    no_resume_kv_cache: Annotated[bool, _switch("--no-resume-kv-cache", "Start with an empty cache.")] = False,
    clean_obsolete_kv_cache: Annotated[bool, _switch("--clean-obsolete-kv-cache", "Remove unused caches of other models.")] = False,
    disable_gpu_reuse: Annotated[bool, _switch("--disable-gpu-reuse", "Ignore prefixes in GPU memory.")] = False,
    disable_long_token: Annotated[bool, _switch("--disable-long-token", "Keep blocks of prompts only.")] = False,
    disable_kv_cache: Annotated[bool, _switch("--disable-kv-cache", f"Plain vLLM; also {SEED_SPELLING}.")] = False,
    dry_run: Annotated[bool, _switch("--dry-run", "Print the command and do not run it.")] = False,
) -> None:
    """Starts vLLM's OpenAI server with KV-cache offloading. All other options are those of vllm serve.

    Example: kvoffload serve MODEL --nvme-path /mnt/nvme/kv --ssd-kv-offload-gb 500 --port 8000

    Exit code: 0 of a dry run, else vLLM's own; 2 for a mistake in the call.
    """
    if not context.args:
        raise UserError("no model is named: kvoffload serve MODEL, then options")
    if resume_kv_cache and no_resume_kv_cache:
        raise UserError("--resume-kv-cache and --no-resume-kv-cache contradict each other: leave one of them out")
    given = {
        "nvme_path": nvme_path,
        "dram_kv_offload_gb": _number("--dram-kv-offload-gb", dram_kv_offload_gb),
        "ssd_kv_offload_gb": _number("--ssd-kv-offload-gb", ssd_kv_offload_gb),
        "ssd_admission": ssd_admission,
        "ssd_write_gb_per_day": _number("--ssd-write-gb-per-day", ssd_write_gb_per_day),
        "resume_kv_cache": resume_kv_cache or (False if no_resume_kv_cache else None),
        "clean_obsolete_kv_cache": clean_obsolete_kv_cache or None,
        "disable_gpu_reuse": disable_gpu_reuse or None,
        "disable_long_token": disable_long_token or None,
        "disable_kv_cache": disable_kv_cache or None,
    }
    if nvme_path and ssd_kv_offload_gb is None:
        given["ssd_kv_offload_gb"] = AUTOMATIC
    config = Config.parse({key: value for key, value in given.items() if value is not None})
    command = [*VLLM, *(with_connector(context.args, config) if config.enabled else context.args)]
    added = environment(os.environ) if config.enabled else {}
    if not config.enabled:
        give = "give --ssd-kv-offload-gb more than 0" if nvme_path else "give --nvme-path or --dram-kv-offload-gb to offload"
        reason = "--disable-kv-cache is set" if disable_kv_cache else give
        print(f"kvoffload: plain vLLM, nothing is offloaded: {reason}", file=sys.stderr)
    if dry_run:
        print(shlex.join([*(f"{name}={value}" for name, value in added.items()), *command]))
        return
    if find_spec("vllm") is None:
        raise UserError(f"vLLM is not installed for {sys.executable}: install it there with pip install vllm")
    for path in config.nvme_path if config.enabled else ():
        check_usable(path)  # else the engine would say so, in a traceback, once the model is loaded
    sys.stdout.flush()
    os.execvpe(command[0], command, os.environ | added)  # signals reach vLLM itself, and its exit code is the command's


def with_connector(args: Sequence[str], config: Config) -> list[str]:
    """vLLM's arguments, with ours behind them: the model must stay first, and an option ends a list of values."""
    end = args.index("--") if "--" in args else len(args)
    for argument in args[:end]:
        _refuse_other_connector(argument)
    for file, name in _named_in_files(args[:end]):
        _refuse_other_connector(f"--{name}", f" in {file}")
    settings: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    transfer = {**CONNECTOR, "kv_connector_extra_config": settings}
    return [*args[:end], "--kv-transfer-config", json.dumps(transfer), *args[end:]]


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What vLLM's environment needs beside what is given, for its cache to be found again after a restart."""
    installed = window.installed()
    # Before, vLLM draws the seed of its block hashes at each start, unless this names one.
    draws_seed = installed is not None and window.release(installed) < window.FIXED_HASH_SEED
    return {"PYTHONHASHSEED": "0"} if draws_seed and "PYTHONHASHSEED" not in given else {}


def _named_in_files(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options in a file of vLLM's --config, and its name. What is wrong with such a file vLLM itself says."""
    files = [value for name, value in pairwise(args) if name == "--config"]
    files += [argument.removeprefix("--config=") for argument in args if argument.startswith("--config=")]
    for file in files:
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            found = yaml.safe_load(Path(file).read_text())
            yield from ((file, str(name)) for name in found) if isinstance(found, dict) else ()


def _refuse_other_connector(argument: str, where: str = "") -> None:
    name = argument.partition("=")[0].replace("_", "-")
    if name.startswith(("--kv-t", "--kv-o")):  # vLLM takes an option by its beginning, and --kv-transfer-config.kv_role too
        raise UserError(
            f"{name}{where} sets up KV transfer, and so does kvoffload serve: "
            "leave it out, or leave out kvoffload's sizes to use it"
        )


def _number(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name} must be a number of GB (10^9 bytes), not {text!r}") from None
