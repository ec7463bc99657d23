"""The split of the requests for `name` between the aliases `default`, `canary` and `shadow`."""

import hashlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

CANARY = "canary"
SHADOW = "shadow"

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Traffic(BaseModel):
    """Shares of the requests for the alias `default`, in percent; 0 is none.

    `name@canary` answers the canary's share. `name@shadow` gets copies of the shadow's share, and its answers are not
    sent to clients.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    canary: Percent = 0
    shadow: Percent = 0


def is_in_share(percent: float, *, revision: str, session: str) -> bool:
    """Check whether `session` is in the `percent` of all sessions that `revision` gets.

    The result is the same for the same arguments in every process, and a larger share includes the smaller one. Each
    revision gets different sessions, so that the same users do not try every new one.
    """
    digest = hashlib.sha256(f"{revision}\0{session}".encode()).digest()
    return int.from_bytes(digest[:8]) < percent / 100 * 2**64
