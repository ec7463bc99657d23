"""Models that bring Python code of their own, which runs only where it is trusted."""

from collections.abc import Iterator
from contextlib import contextmanager

from training.errors import ConfigError


@contextmanager
def own_code_refused(model: str, remedy: str) -> Iterator[None]:
    """Says what to do where transformers refuses a model whose architecture it does not have.

    `remedy`: the flag or setting that lets the code of `model` run, as "set `x: true`". Raises ConfigError.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(
            f"{model} needs Python code that comes with it: {remedy} if you have read that code, and let it run"
        ) from error
