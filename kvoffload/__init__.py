"""kvoffload: a KV-cache offload engine for vLLM (GPU -> pinned DRAM -> NVMe slot files, and back)."""

__version__ = "0.1.0"
