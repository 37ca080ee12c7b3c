"""The rim: everything that knows vLLM."""
