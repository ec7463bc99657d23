"""Many adapters, few places: loading, eviction and waiting, without breaking a rule of the engine."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterRef, AdapterStore, Manifest, read_golden, write_golden
from app.engine.base import Endpoint, Unobserved
from app.errors import AdapterRefused, AdapterUnavailable, EngineUnavailable, ProofFailed
from app.lifecycle.loader import Loader
from app.lifecycle.residency import Limits, Residency
from app.metrics import Metrics
from tests.adapters.folders import GOLDEN, make_folder
from tests.app.fake_engine import FakeEngine

ADAPTERS = 8
SIZE = 10**6


class Rig:
    """A residency on a fake engine, and a store with adapters `a0`, `a1`, ..."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.store = AdapterStore(folder / "store")
        self.wanted: Callable[[str], bool] = lambda _: True
        self.metrics = Metrics()
        self.limits = Limits(
            **{"max_resident": 3, "max_resident_bytes": 2**30, "max_loras": 2, "wait_seconds": 5, **limits}
        )
        loader = Loader(self.store, self.metrics, recorded_dir=folder / "recorded", allow_unproven=True)

        def is_wanted(ref: str) -> bool:
            return self.wanted(ref)

        self.engine = FakeEngine()
        self.residency = Residency(
            self.store, self.metrics, self.limits, loader,
            engine=self.live_engine, answers=is_wanted, is_wanted=is_wanted,
        )  # fmt: skip

    def live_engine(self) -> FakeEngine:
        if self.engine.is_dead:
            raise EngineUnavailable("the engine stopped")
        return self.engine

    def manifest(self, number: int) -> Manifest:
        return self.store.get(AdapterRef(f"a{number}", alias="default"))

    def ref(self, number: int) -> str:
        manifest = self.manifest(number)
        return manifest.ref

    def held(self) -> list[str]:
        return sorted(adapter.name.partition("@")[0] for adapter in self.engine.held.values())

    async def use(self, number: int) -> str:
        with await self.residency.lease(self.manifest(number)) as lease:
            body = {"model": f"a{number}", "messages": []}
            answer = await lease.engine.answer(
                Endpoint.CHAT,
                body,
                request_id="",
                adapter=lease.adapter,
                fingerprint="",
                observer=Unobserved(),
            )
        assert isinstance(answer.reply, dict)
        return str(answer.reply["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with adapters that all have golden prompts."""
    folder = tmp_path_factory.mktemp("residency")
    store = AdapterStore(folder / "store")
    for number in range(ADAPTERS):
        path = make_folder(folder / str(number), seed=number).write()
        write_golden(path / "golden.jsonl", [GOLDEN])
        manifest = store.publish(path, f"a{number}", actor="test")
        store.set_alias(f"a{number}", "default", manifest.revision, actor="test")
    return folder


def _run(check: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(check, 60))


def test_the_least_recently_used_is_evicted_first(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled)
        for number in (0, 1, 2, 0, 3):
            assert (await rig.use(number)).startswith(f"a{number}@")
        assert rig.held() == ["a0", "a2", "a3"]
        assert rig.engine.most_held == 3
        assert (await rig.use(1)).startswith("a1@")  # loaded again, under a new id
        assert rig.engine.loads[rig.ref(1)] == 2
        assert not rig.engine.broken_rules

    _run(check())


def test_a_leased_revision_is_not_evicted(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled, max_resident=2)
        held = await rig.residency.lease(rig.manifest(0))
        for number in (1, 2, 3, 1):
            await rig.use(number)
        assert rig.held() == ["a0", "a1"]
        with held:
            pass
        for number in (2, 3):
            await rig.use(number)
        assert rig.held() == ["a2", "a3"]

    _run(check())


def test_the_limit_in_bytes(filled: Path) -> None:
    async def check() -> None:
        size = Rig(filled).store.folder("a0", Rig(filled).manifest(0).revision) / "adapter_model.safetensors"
        rig = Rig(filled, max_resident=8, max_resident_bytes=int(size.stat().st_size * 2.5))
        for number in range(4):
            await rig.use(number)
        assert rig.held() == ["a2", "a3"]
        small = Rig(filled, max_resident_bytes=10)
        with pytest.raises(AdapterUnavailable):
            await small.use(0)
        with pytest.raises(AdapterRefused, match="XINGLIN_MAX_RESIDENT_GIB"):
            await small.residency.hold(small.manifest(0))

    _run(check())


def test_a_wait_is_bounded(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled, max_loras=1, wait_seconds=0.05)
        with await rig.residency.lease(rig.manifest(0)):
            with pytest.raises(AdapterUnavailable, match=r"within 0\.05 s"):
                await rig.use(1)
            assert rig.residency.waiting() == {}
        assert await rig.use(1)

    _run(check())


def test_loading_does_not_count_as_waiting(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled, wait_seconds=0.05)
        rig.engine.seconds = 0.1
        assert (await rig.use(0)).startswith("a0@")

    _run(check())


def test_a_load_cancelled_twice_keeps_its_place(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled, max_resident=3)
        rig.engine.seconds = 0.1
        given_up = asyncio.create_task(rig.use(0))
        await asyncio.sleep(0.05)
        for _ in range(3):
            given_up.cancel()
            await asyncio.sleep(0.01)
        assert rig.residency.leases(rig.ref(0)) == 1
        await asyncio.gather(given_up, return_exceptions=True)
        assert rig.residency.leases(rig.ref(0)) == 0
        assert rig.held() == ["a0"]

    _run(check())


def test_an_unwanted_revision_is_removed_after_its_last_request(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled)
        first, second = [await rig.residency.lease(rig.manifest(0)) for _ in range(2)]
        rig.wanted = lambda _: False
        rig.residency.let_go(rig.ref(0))
        with first:
            pass
        await asyncio.sleep(0.01)
        assert rig.held() == ["a0"]
        with second:
            pass
        await asyncio.sleep(0.01)
        assert rig.held() == []
        assert not rig.engine.broken_rules

    _run(check())


def test_concurrent_first_requests_share_one_load(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled)
        rig.engine.seconds = 0.01
        answers = await asyncio.gather(*(rig.use(0) for _ in range(20)))
        assert len(set(answers)) == 1
        assert rig.engine.loads[rig.ref(0)] == 1

    _run(check())


def test_a_shadow_request_takes_only_free_room(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled, max_loras=1)
        assert rig.residency.lease_if_free(rig.manifest(0)) is None, "loading it would keep others waiting"
        await rig.use(0)
        lease = rig.residency.lease_if_free(rig.manifest(0))
        assert lease is not None
        rig.residency.has_line.clear()
        waiting = asyncio.create_task(rig.use(1))
        await asyncio.wait_for(rig.residency.has_line.wait(), 1)
        assert rig.residency.lease_if_free(rig.manifest(0)) is None, "somebody waits"
        with lease:
            pass
        assert (await waiting).startswith("a1@")

    _run(check())


def test_a_failed_load_is_not_retried_at_every_request(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled)
        manifest = rig.manifest(0)
        mark = rig.store.folder("a0", manifest.revision).parent / "refuse-to-load"
        mark.touch()
        try:
            for _ in range(3):
                with pytest.raises(AdapterUnavailable, match="GET /v1/adapters shows why"):
                    await rig.use(0)
            assert isinstance(rig.residency.failure(rig.ref(0)), AdapterRefused)
            assert next(rig.engine._ids) == 2, "it was tried more than once"
            assert (await rig.use(1)).startswith("a1@")
        finally:
            mark.unlink()
        _, held = await rig.residency.hold(manifest)  # an operator's attempt is not delayed
        with held:
            assert (await rig.use(0)).startswith("a0@")
        assert rig.residency.failure(rig.ref(0)) is None

    _run(check())


def test_a_dead_engine_leaves_no_request_or_slot_behind(filled: Path) -> None:
    async def check() -> None:
        rig = Rig(filled, max_loras=1)
        dead = rig.engine
        dead.seconds = 0.02
        requests = [asyncio.create_task(rig.use(number % 4)) for number in range(12)]
        await asyncio.sleep(0.05)
        dead.is_dead = True
        await rig.residency.clear()
        results = await asyncio.gather(*requests, return_exceptions=True)
        wrong = [r for r in results if isinstance(r, BaseException) and not isinstance(r, EngineUnavailable)]
        assert not wrong
        rig.engine = FakeEngine()
        for number in range(4):
            assert (await rig.use(number)).startswith(f"a{number}@")
        assert not rig.engine.broken_rules
        assert rig.residency.slots_taken == 0

    _run(check())


def test_an_unproven_adapter_must_match_its_recorded_answers(filled: Path, tmp_path: Path) -> None:
    path = make_folder(tmp_path / "plain", seed=99).write()
    store = AdapterStore(filled / "store")
    manifest = store.publish(path, "plain", actor="test")

    async def check() -> None:
        for drift, is_alike in ((0.0, True), (0.0, True), (0.5, False)):
            rig = Rig(filled)  # a restarted service
            rig.engine.drift = drift
            if is_alike:
                with await rig.residency.lease(manifest):
                    assert rig.residency.is_resident(f"plain@{manifest.revision}")
            else:
                with pytest.raises(ProofFailed, match="the base model alone is not the one"):
                    await rig.residency.hold(manifest)
                assert rig.engine.held == {}
            (recorded,) = (filled / "recorded").rglob("*.jsonl")
            assert len(read_golden(recorded)) == 8

    _run(check())


@pytest.mark.parametrize("seed", range(12))
def test_at_random(filled: Path, seed: int) -> None:
    """Requests for more adapters than fit, some cancelled, while the wanted ones change: no rule is broken."""

    async def check() -> None:
        choice = random.Random(seed)
        rig = Rig(filled, max_resident=3, max_loras=2, wait_seconds=30)
        rig.engine.seconds = 0.001
        wanted: set[str] = {rig.ref(number) for number in range(ADAPTERS)}
        rig.wanted = lambda ref: ref in wanted
        answered: Counter[int] = Counter()

        async def client() -> None:
            for _ in range(25):
                number = choice.randrange(ADAPTERS)
                request = asyncio.create_task(rig.use(number))
                if choice.random() < 0.15:
                    await asyncio.sleep(choice.random() * 0.01)
                    request.cancel()
                    await asyncio.gather(request, return_exceptions=True)
                    continue
                assert (await request).startswith(f"a{number}@")
                answered[number] += 1

        async def change() -> None:
            for _ in range(60):
                ref = rig.ref(choice.randrange(ADAPTERS))
                wanted.symmetric_difference_update({ref})
                rig.residency.let_go(ref)
                await asyncio.sleep(0.002)

        await asyncio.gather(*(client() for _ in range(12)), change())
        await asyncio.sleep(0.05)
        assert not rig.engine.broken_rules
        assert len(answered) == ADAPTERS
        assert rig.engine.most_held <= 3
        assert rig.engine.most_adapters_running <= 3, "two with requests, and one under proof"
        assert sum(rig.engine.running.values()) == 0
        residents = rig.residency.residents()
        assert {r.loaded.engine_id for r in residents} == await rig.engine.resident()
        assert all(rig.residency.leases(r.loaded.name) == 0 and r.loaded.name in wanted for r in residents)
        assert rig.residency.waiting() == {}
        assert rig.residency.slots_taken == 0

    _run(check())
