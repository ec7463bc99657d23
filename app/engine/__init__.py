"""The engine that generates, and the only door to vLLM."""
