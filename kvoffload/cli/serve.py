"""`kvoffload serve`: `vllm serve` with kvoffload turned on."""

import json
import os
import shlex
import sys
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from kvoffload.config import AUTOMATIC, Admissions, Config
from kvoffload.errors import ConfigError, UserError

SERVER = "kvoffload.vllm.server"
# Of vLLM's own flags, those that would set what we set.
THEIRS = {
    "--kv-transfer-config": "kvoffload serve writes --kv-transfer-config itself: leave it out, or use vllm serve",
    "--kv-offloading-size": "--kv-offloading-size turns on vLLM's own offloading: leave it out, or use vllm serve",
    "--kv-offloading-backend": "--kv-offloading-backend is about vLLM's own offloading: leave it out, or use vllm serve",
}
SETTINGS = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "token_normalize_func": lambda token: token.replace("_", "-"),
}


def serve(
    context: typer.Context,
    nvme_path: Annotated[list[str] | None, typer.Option(help="Directory for the SSD tier; once for each drive.")] = None,
    dram_kv_offload_gb: Annotated[float | None, typer.Option(help="Cap of the DRAM tier.")] = None,
    ssd_kv_offload_gb: Annotated[float | None, typer.Option(help="Cap of the SSD tier; -1, the default: what is free.")] = None,
    ssd_admission: Annotated[Admissions | None, typer.Option(help="What is written to the SSD.")] = None,
    ssd_write_gb_per_day: Annotated[float | None, typer.Option(help="Budget of writes to the SSD.")] = None,
    resume_kv_cache: Annotated[bool, typer.Option("--resume-kv-cache", help="Use what an earlier run left (default).")] = False,
    no_resume_kv_cache: Annotated[bool, typer.Option("--no-resume-kv-cache", help="Start with an empty cache.")] = False,
    clean_obsolete_kv_cache: Annotated[
        bool, typer.Option("--clean-obsolete-kv-cache", help="Remove caches that do not match and nobody uses.")
    ] = False,
    disable_gpu_reuse: Annotated[bool, typer.Option("--disable-gpu-reuse", help="Ignore prefixes in GPU memory.")] = False,
    disable_long_token: Annotated[bool, typer.Option("--disable-long-token", help="Keep blocks of prompts only.")] = False,
    disable_kv_cache: Annotated[
        bool, typer.Option("--disable-kv-cache", "--disable-kv-cache-offload", help="Plain vLLM.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command instead of running it.")] = False,
) -> None:
    """vllm serve with kvoffload. All that is not listed here goes to vLLM as it is.

    Example: kvoffload serve MODEL --nvme-path /mnt/nvme/kv --ssd-kv-offload-gb 500 --port 8000

    Exit code: 0 of a dry run; vLLM's own; 2 for a mistake in the call.
    """
    if resume_kv_cache and no_resume_kv_cache:
        raise ConfigError("--resume-kv-cache and --no-resume-kv-cache contradict each other: give one of them")
    if nvme_path and ssd_kv_offload_gb is None:
        ssd_kv_offload_gb = AUTOMATIC
    asked: dict[str, Any] = {
        "nvme_path": nvme_path or None,
        "dram_kv_offload_gb": dram_kv_offload_gb,
        "ssd_kv_offload_gb": ssd_kv_offload_gb,
        "ssd_admission": ssd_admission,
        "ssd_write_gb_per_day": ssd_write_gb_per_day,
        "resume_kv_cache": False if no_resume_kv_cache else resume_kv_cache or None,
        "clean_obsolete_kv_cache": clean_obsolete_kv_cache or None,
        "disable_gpu_reuse": disable_gpu_reuse or None,
        "disable_long_token": disable_long_token or None,
        "disable_kv_cache": disable_kv_cache or None,
    }
    given = command(context.args, {key: value for key, value in asked.items() if value is not None})
    if dry_run:
        print(shlex.join(given))
        return
    if find_spec("vllm") is None:
        raise UserError(f"vLLM is not installed for {sys.executable}: pip install vllm")
    sys.stdout.flush()
    os.execv(given[0], given)  # signals and the exit code are vLLM's own


def command(arguments: list[str], settings: dict[str, Any]) -> list[str]:
    """What starts vLLM; ConfigError or UserError if the settings do not fit together or with vLLM's `arguments`."""
    for argument in arguments:
        name = argument.split("=")[0].split(".")[0].replace("_", "-")
        if name in THEIRS:
            raise UserError(THEIRS[name])
    config = Config.parse(settings)
    made = [sys.executable, "-m", SERVER, *arguments]
    if not config.enabled:
        if not config.disable_kv_cache:
            print("kvoffload: nothing is offloaded: give --nvme-path, or --dram-kv-offload-gb", file=sys.stderr)
        return made
    transfer = {
        "kv_connector": "KVOffloadConnector",
        "kv_connector_module_path": "kvoffload.vllm.connector",  # found also where VLLM_PLUGINS leaves our plugin out
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
    }
    return [*made, "--kv-transfer-config", json.dumps(transfer)]
