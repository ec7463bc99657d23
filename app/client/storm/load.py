"""The load: streams that send requests continuously, first without swaps (calm), then during swaps (storm)."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter

from app.client.storm.client import Client
from app.client.storm.ledger import Ledger
from app.client.storm.stage import Messages, seeded

_WARM_UP_SECONDS = 2.0
"""Not measured, since all streams start at once."""
_LAG_SECONDS = 0.005
_PAUSE_AFTER_FAILURE = 0.2


async def under_load(
    client: Client,
    models: Sequence[str],
    questions: Sequence[Messages],
    ledger: Ledger,
    operate: Callable[[], Awaitable[None]],
    *,
    streams: int,
    seconds: float,
    seed: int,
    stop: asyncio.Event,
) -> None:
    """Request `models` in `streams` streams; after `seconds` of calm run `operate`. `stop` ends the calm."""
    ended = asyncio.Event()

    async def stream(number: int) -> None:
        chance = seeded(seed, f"stream {number}")
        while not ended.is_set():
            question = chance.randrange(len(questions))
            answer = await client.ask(chance.choice(models), question, questions[question])
            ledger.add_stream(answer)
            if answer.failure:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE)

    running = [asyncio.create_task(stream(number)) for number in range(streams)]
    lag = asyncio.create_task(_watch_lag(ledger))
    try:
        await _unless(stop, _WARM_UP_SECONDS)
        ledger.calm_began = perf_counter()
        await _unless(stop, seconds)
        ledger.storm_began = perf_counter()
        await operate()
        ledger.storm_ended = perf_counter()
    finally:
        lag.cancel()
        ended.set()
        await asyncio.gather(*running)


async def _unless(stop: asyncio.Event, seconds: float) -> None:
    """Wait for `seconds`, or until `stop` is set."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


async def _watch_lag(ledger: Ledger) -> None:
    while True:
        asleep = perf_counter()
        await asyncio.sleep(_LAG_SECONDS)
        ledger.lags.append(perf_counter() - asleep - _LAG_SECONDS)
