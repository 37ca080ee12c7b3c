"""Entry point of the group `vllm.general_plugins`: makes the connector known by its name alone."""

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

NAME = "KVOffloadConnector"


def register() -> None:
    """vLLM calls this in every process, sometimes more than once."""
    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvoffload.vllm.connector", NAME)
