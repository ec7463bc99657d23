"""Models that ship their own Python code, which runs only if the job trusts it."""

from collections.abc import Iterator
from contextlib import contextmanager

from training.errors import ConfigError


@contextmanager
def own_code_refused(model: str, remedy: str) -> Iterator[None]:
    """Raise ConfigError with a remedy if transformers refuses a model because it needs its own code.

    `remedy`: the flag or setting that allows the code of `model`, such as "set `x: true`".
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(
            f"{model} needs Python code that comes with it: {remedy} if you have read and trust that code"
        ) from error
