"""A fair queue for a scarce resource: engine slots, or places in the engine's memory.

Requests of one adapter share its place. While the queue is empty, a request enters if there is room. As soon as a
request waits, all new ones queue behind it, even those of adapters inside: these drain, and the queue moves. So even a
hot adapter delays another one only by the answers in progress and by one turn of each adapter ahead in the queue.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class _Waiting:
    cost: int
    arrivals: list[asyncio.Future[None]] = field(default_factory=list)


@dataclass
class _Inside:
    cost: int
    holders: int = 0


class Turns:
    """Admits keys while their total cost is at most `capacity`."""

    def __init__(self, capacity: int, *, on_line: Callable[[], None] = lambda: None) -> None:
        """Calls `on_line` whenever a request starts to wait."""
        self._capacity = capacity
        self._on_line = on_line
        self._inside: dict[str, _Inside] = {}
        self._line: dict[str, _Waiting] = {}

    async def enter(self, key: str, cost: int = 1) -> None:
        """Wait for the turn of `key`. Call `leave` once for every `enter` that returned."""
        if self.enter_at_once(key, cost):
            return
        arrival = asyncio.get_running_loop().create_future()
        self._line.setdefault(key, _Waiting(cost)).arrivals.append(arrival)
        self._on_line()
        try:
            await arrival
        except BaseException:
            self._give_up(key, arrival)
            raise

    def enter_at_once(self, key: str, cost: int = 1) -> bool:
        """Enter if the queue is empty and there is room; return whether it entered."""
        if self._line or not self._has_room(key, cost):
            return False
        self._count_in(key, cost)
        return True

    def leave(self, key: str) -> None:
        """Leave, and let the queue move if there is room."""
        inside = self._inside[key]
        inside.holders -= 1
        if inside.holders == 0:
            del self._inside[key]
            self._move_on()

    def dismiss(self, error: Exception) -> None:
        """Raise `error` in every waiting request."""
        for waiting in self._line.values():
            for arrival in waiting.arrivals:
                if not arrival.done():
                    arrival.set_exception(error)
        self._line.clear()

    def holders(self, key: str) -> int:
        """Return how many requests of `key` are inside."""
        return self._inside[key].holders if key in self._inside else 0

    @property
    def has_line(self) -> bool:
        """Whether any request waits."""
        return bool(self._line)

    @property
    def taken(self) -> int:
        """The capacity in use."""
        return sum(inside.cost for inside in self._inside.values())

    def waiting(self) -> dict[str, int]:
        """Return the number of waiting requests by key, in the order of turns."""
        return {key: len(waiting.arrivals) for key, waiting in self._line.items()}

    def _has_room(self, key: str, cost: int) -> bool:
        return key in self._inside or self.taken + cost <= self._capacity

    def _count_in(self, key: str, cost: int) -> None:
        self._inside.setdefault(key, _Inside(cost)).holders += 1

    def _move_on(self) -> None:
        """Admit the first key of the queue with all its requests, while there is room."""
        while self._line:
            key, waiting = next(iter(self._line.items()))
            if not self._has_room(key, waiting.cost):
                return
            del self._line[key]
            for arrival in waiting.arrivals:
                if not arrival.done():
                    self._count_in(key, waiting.cost)
                    arrival.set_result(None)

    def _give_up(self, key: str, arrival: asyncio.Future[None]) -> None:
        if arrival.done() and not arrival.cancelled() and arrival.exception() is None:
            self.leave(key)  # its turn came while it was being cancelled
            return
        waiting = self._line.get(key)
        if waiting is not None and arrival in waiting.arrivals:
            waiting.arrivals.remove(arrival)
            if not waiting.arrivals:
                del self._line[key]
                self._move_on()  # the next in the queue may find room
