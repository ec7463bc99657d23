"""The fair queue: no overtaking, no starvation, and no loss when a request is cancelled."""

import asyncio
import random
from collections import Counter

import pytest

from app.errors import EngineUnavailable
from app.lifecycle.turns import Turns


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_requests_of_one_key_share_its_place() -> None:
    async def check() -> None:
        turns = Turns(1)
        for _ in range(3):
            await turns.enter("a")
        assert turns.taken == 1
        for _ in range(3):
            turns.leave("a")
        assert turns.taken == 0

    asyncio.run(check())


def test_a_hot_key_queues_once_another_waits() -> None:
    async def check() -> None:
        turns = Turns(1)
        entered: list[str] = []

        async def come(key: str) -> None:
            await turns.enter(key)
            entered.append(key)

        await come("hot")
        tasks = [asyncio.create_task(come(key)) for key in ("cold", "hot", "hot")]
        await _settle()
        assert entered == ["hot"]
        assert turns.waiting() == {"cold": 1, "hot": 2}
        turns.leave("hot")
        await _settle()
        assert entered == ["hot", "cold"]
        turns.leave("cold")
        await asyncio.gather(*tasks)
        assert entered == ["hot", "cold", "hot", "hot"]

    asyncio.run(check())


def test_a_key_inside_enters_again_when_it_is_first_in_the_queue() -> None:
    async def check() -> None:
        turns = Turns(1)
        await turns.enter("hot")
        cold = asyncio.create_task(turns.enter("cold"))
        await _settle()
        hot = asyncio.create_task(turns.enter("hot"))
        await _settle()
        cold.cancel()
        await hot
        assert not turns.has_line

    asyncio.run(check())


def test_costs_add_up_and_a_large_cost_is_not_overtaken() -> None:
    async def check() -> None:
        turns = Turns(10)
        await turns.enter("a", 6)
        large = asyncio.create_task(turns.enter("large", 9))
        await _settle()
        small = asyncio.create_task(turns.enter("small", 1))
        await _settle()
        assert not turns.enter_at_once("tiny", 1)
        assert list(turns.waiting()) == ["large", "small"]
        turns.leave("a")
        await asyncio.gather(large, small)
        assert turns.taken == 10

    asyncio.run(check())


def test_dismissed() -> None:
    async def check() -> None:
        turns = Turns(1)
        await turns.enter("a")
        waiting = asyncio.create_task(turns.enter("b"))
        await _settle()
        turns.dismiss(EngineUnavailable("gone"))
        with pytest.raises(EngineUnavailable):
            await waiting
        turns.leave("a")
        assert turns.taken == 0

    asyncio.run(check())


@pytest.mark.parametrize("seed", range(10))
def test_at_random_no_key_starves_and_the_capacity_holds(seed: int) -> None:
    """Two keys are requested all the time; every other one still gets its turn."""

    async def check() -> None:
        choice = random.Random(seed)
        turns = Turns(2)
        served: Counter[str] = Counter()
        ended = asyncio.Event()

        async def use(key: str) -> None:
            await turns.enter(key)
            try:
                assert turns.taken <= 2
                served[key] += 1
                await asyncio.sleep(choice.random() * 0.002)
            finally:
                turns.leave(key)

        async def hot(key: str) -> None:
            while not ended.is_set():
                await use(key)

        async def quitter() -> None:
            while not ended.is_set():
                task = asyncio.create_task(use(f"quitter-{choice.randrange(3)}"))
                await asyncio.sleep(choice.random() * 0.003)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        background = [asyncio.create_task(hot(f"hot-{i % 2}")) for i in range(8)]
        background += [asyncio.create_task(quitter()) for _ in range(4)]
        await asyncio.sleep(0.01)
        await asyncio.wait_for(asyncio.gather(*(use(f"cold-{i}") for i in range(20))), 20)
        ended.set()
        await asyncio.gather(*background)
        assert turns.taken == 0
        assert not turns.has_line
        assert served["hot-0"] > 1

    asyncio.run(check())
