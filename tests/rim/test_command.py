"""What `kvoffload serve` hands over is what vLLM's own parser understands."""

import json
import subprocess

import pytest
import vllm
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvoffload.cli import app
from kvoffload.cli.serve import VLLM, with_connector
from kvoffload.config import Config
from tests.patience import PATIENCE_S

SETTINGS = {"nvme_path": ["/a", "/b"], "ssd_kv_offload_gb": 5.0, "resume_kv_cache": False}


@pytest.fixture(scope="module")
def parser():
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


@pytest.mark.parametrize(
    "args",
    [
        ["model", "--served-model-name", "one", "two"],
        ["model", "--served-model-name=one", "--lora-modules", "l=/l"],
        ["--port", "8000", "--", "model"],
    ],
)
def test_vllm_reads_the_connector_and_the_settings_wherever_the_model_stands(parser, args):
    parsed = parser.parse_args(["serve", *with_connector(args, Config.parse(SETTINGS))])
    assert parsed.model_tag == "model"
    transfer = parsed.kv_transfer_config
    assert (transfer.kv_connector, transfer.kv_role) == ("KVOffloadConnector", "kv_both")
    assert transfer.kv_connector_module_path == "kvoffload.vllm.connector"
    assert transfer.kv_load_failure_policy == "recompute"
    assert transfer.kv_connector_extra_config == json.loads(json.dumps(SETTINGS))


def test_no_option_of_vllm_is_taken_for_one_of_ours(parser):
    (subparsers,) = (action for action in parser._actions if action.dest == "subparser")
    vllms = {name for name in subparsers.choices["serve"]._option_string_actions if name.startswith("--")}
    (command,) = (command for command in app.registered_commands if command.callback.__name__ == "serve")
    ours = {"--" + name.replace("_", "-") for name in command.callback.__annotations__} | {"--disable-kv-cache-offload"}
    assert not vllms & ours
    assert {name for name in vllms if name.startswith(("--kv-t", "--kv-o"))} == {
        "--kv-transfer-config", "--kv-offloading-size", "--kv-offloading-backend",
    }  # fmt: skip


def test_the_command_runs_the_installed_vllm_under_any_name_of_its_distribution(tmp_path):
    (tmp_path / "vllm.py").write_text("raise ImportError('the working directory is not where vLLM lies')")
    *command, _ = VLLM
    done = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (vllm.__version__, vllm.__version__ + "+cpu")
