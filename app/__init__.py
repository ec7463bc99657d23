"""The service: hosts base models on vLLM, swaps adapters under live traffic, speaks OpenAI's protocol."""
