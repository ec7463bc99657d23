"""How the requests for `name` are shared out between the aliases `default`, `canary` and `shadow`."""

import hashlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

CANARY = "canary"
SHADOW = "shadow"

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Traffic(BaseModel):
    """Shares of the requests for the alias `default`, in percent; 0 is none.

    The canary's share is answered by `name@canary`. Of the shadow's share `name@shadow` gets a copy, and its
    answers go to nobody.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    canary: Percent = 0
    shadow: Percent = 0


def is_in_share(percent: float, *, revision: str, session: str) -> bool:
    """Whether `session` belongs to the `percent` of all sessions that `revision` gets.

    Always the same for the same three, in every process, and a larger share holds the smaller one. Each
    revision draws its own, so that not the same people try every new one.
    """
    digest = hashlib.sha256(f"{revision}\0{session}".encode()).digest()
    return int.from_bytes(digest[:8]) < percent / 100 * 2**64
