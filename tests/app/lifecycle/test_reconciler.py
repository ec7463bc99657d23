"""Operators, other writers of the store, requests and failures all at once: store, service and engine agree."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import CANARY, AdapterError, AdapterRef, AdapterStore, Traffic, write_golden
from app.engine.base import Endpoint
from app.errors import AdapterRefused, AdapterUnavailable, ApiError, ModelNotFound
from app.lifecycle.bases import Host, Hosts
from app.lifecycle.loader import Loader
from app.lifecycle.reconciler import Reconciler
from app.lifecycle.residency import Limits, Residency
from app.lifecycle.served_models import ServedModels
from app.metrics import Metrics
from tests.adapters.folders import GOLDEN, SCORE, make_folder
from tests.app.fake_engine import FakeEngine

REVISIONS = 5


class Rig:
    """A reconciler on a fake engine, and a store with several revisions of `doctor`."""

    def __init__(self, folder: Path, *, max_resident: int = 3, allow_revisions: bool = False) -> None:
        self.store = AdapterStore(folder / "store")
        self.revisions = []
        for seed in range(REVISIONS):
            path = make_folder(folder / str(seed), seed=seed).write()
            write_golden(path / "golden.jsonl", [GOLDEN])
            self.revisions.append(self.store.publish(path, "doctor", actor="test").revision)
        metrics = Metrics()
        self.served = ServedModels(["tiny"])
        loader = Loader(self.store, metrics, recorded_dir=folder / "recorded", allow_unproven=False)
        limits = Limits(
            max_resident=max_resident, max_resident_bytes=2**30, max_loras=max_resident - 1, wait_seconds=10
        )
        self.residency = Residency(
            self.store, metrics, limits, loader,
            is_wanted=lambda ref: allow_revisions or self.served.is_wanted(ref),
        )  # fmt: skip
        self.host = Host("tiny", self.residency)
        self.reconciler = Reconciler(
            self.store, self.served, Hosts([self.host]), metrics,
            allow_revisions=allow_revisions, interval=0.01,
        )  # fmt: skip
        self.engine = FakeEngine()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        await self.reconciler.attach(self.host, self.engine)
        task = asyncio.create_task(self.reconciler.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def break_revision(self, revision: str) -> None:
        (self.store.folder("doctor", revision) / "adapter_model.safetensors").write_bytes(b"broken")

    def actual(self, alias: str = "default") -> str | None:
        manifest = self.served.find(AdapterRef("doctor", alias=alias))
        return manifest.revision if manifest else None

    async def agree(self) -> None:
        """Wait until store, status, what answers and what the engine holds are of one mind."""
        for _ in range(400):
            await asyncio.sleep(0.01)
            aliases = self.store.aliases("doctor")
            for alias in aliases:  # what left for want of room is back at its next request
                if manifest := self.served.find(AdapterRef("doctor", alias=alias)):
                    with await self.residency.lease(manifest):
                        pass
            status = {alias: one.actual for (_, alias), one in self.reconciler.status.items()}
            served = {alias: self.actual(alias) for alias in aliases}
            held = {adapter.name for adapter in self.engine.held.values()}
            pointed = {f"doctor@{revision}" for revision in aliases.values()}
            traffic = self.served.traffic.get("doctor", Traffic())
            kept = {
                f"doctor@{way_back.revision}"
                for alias in aliases
                if (way_back := self.served.way_back("doctor", alias))
            }
            is_tidy = pointed <= held <= pointed | kept
            if aliases == status == served and is_tidy and traffic == self.store.traffic("doctor"):
                return
        raise AssertionError((aliases, status, served, held))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_everybody_at_once(rig: Rig, seed: int) -> None:
    choice = random.Random(seed)
    who: dict[str, Any] = {"actor": "test", "why": ""}

    async def operate() -> None:
        reconciler = rig.reconciler
        for _ in range(25):
            revision = choice.choice(rig.revisions)
            call = choice.choice(
                [
                    lambda r=revision: reconciler.point("doctor", "default", r, **who),
                    lambda r=revision: reconciler.rollback(
                        "doctor", "default", to=choice.choice([None, r]), **who
                    ),
                    lambda r=revision: reconciler.split("doctor", CANARY, r, choice.randrange(101), **who),
                    lambda: reconciler.promote("doctor", **who),
                    lambda: reconciler.remove("doctor", CANARY, **who),
                ]
            )
            with suppress(AdapterError, ApiError):
                await call()  # type: ignore[no-untyped-call]
            await asyncio.sleep(choice.random() * 0.005)

    async def write_elsewhere() -> None:
        for _ in range(25):
            revision, alias = choice.choice(rig.revisions), choice.choice(["default", CANARY])
            change = choice.choice([rig.store.set_alias, rig.store.set_alias, rig.store.remove_alias])
            arguments = ("doctor", alias) + ((revision,) if change == rig.store.set_alias else ())
            with suppress(AdapterError):
                await asyncio.to_thread(change, *arguments, actor="elsewhere")
            await asyncio.sleep(choice.random() * 0.01)

    async def ask() -> None:
        for _ in range(60):
            try:
                chosen = rig.served.choose("doctor", str(choice.random()))
                with await rig.residency.lease(chosen.manifest) as lease:
                    answer = await lease.engine.answer(
                        Endpoint.CHAT, {"model": "doctor", "messages": []}, request_id="", adapter=lease.adapter,
                        fingerprint="", on_tokens=lambda *_: None,
                    )  # fmt: skip
                assert isinstance(answer.reply, dict)
                assert chosen.manifest
                assert (
                    answer.reply["choices"][0]["message"]["content"] == f"doctor@{chosen.manifest.revision}"
                )
            except (ModelNotFound, AdapterUnavailable):
                pass  # unpointed for a moment
            await asyncio.sleep(choice.random() * 0.004)

    async def check() -> None:
        rig.store.set_alias("doctor", "default", rig.revisions[0], actor="test")
        async with rig.running():
            rig.engine.seconds = 0.001
            await asyncio.gather(operate(), operate(), write_elsewhere(), *(ask() for _ in range(6)))
            await rig.agree()
            assert not rig.engine.broken_rules

    asyncio.run(asyncio.wait_for(check(), 60))


def test_one_that_breaks_on_disk_falls_back_when_it_is_loaded_again(tmp_path: Path) -> None:
    """Evicted, then spoilt, then asked for: the revision before answers, and the status says why."""

    async def check() -> None:
        rig = Rig(tmp_path, max_resident=2)
        first, second, *others = rig.revisions
        for revision in (first, second):
            rig.store.set_alias("doctor", "default", revision, actor="test")
        for alias, revision in zip(("a", "b"), others, strict=False):
            rig.store.set_alias("doctor", alias, revision, actor="test")
        async with rig.running():
            for alias in ("a", "b"):  # both places are taken by others now
                with await rig.residency.lease(rig.served.choose(f"doctor@{alias}").manifest):
                    pass
            assert not rig.residency.is_resident(f"doctor@{second}")
            rig.break_revision(second)
            with pytest.raises(AdapterUnavailable):
                await rig.residency.lease(rig.served.choose("doctor").manifest)
            for _ in range(200):
                await asyncio.sleep(0.01)
                if rig.actual() == first:
                    break
            status = rig.reconciler.status["doctor", "default"]
            assert (status.desired, status.actual, status.state) == (second, first, "failed")
            assert "changed after it was published" in str(status.last_error)
            with await rig.residency.lease(rig.served.choose("doctor").manifest) as lease:
                assert lease.manifest
                assert lease.manifest.revision == first
            assert not rig.engine.broken_rules

    asyncio.run(asyncio.wait_for(check(), 60))


def test_the_way_back_stays_while_there_is_room(tmp_path: Path) -> None:
    """A rollback loads nothing; what is not on the way back any more leaves."""

    async def check() -> None:
        rig = Rig(tmp_path)
        first, second, third, fourth, _ = rig.revisions
        who: dict[str, Any] = {"actor": "test", "why": ""}
        rig.store.set_alias("doctor", "default", first, actor="test")
        async with rig.running():
            await rig.reconciler.point("doctor", "default", second, **who)
            await rig.agree()
            assert rig.residency.is_resident(f"doctor@{first}")
            loads = rig.engine.loads.total()
            assert await rig.reconciler.rollback("doctor", "default", to=None, **who) == first
            assert rig.engine.loads.total() == loads
            await rig.agree()
            assert not rig.residency.is_resident(f"doctor@{second}"), "rolled back from, it is not wanted"
            for revision in (second, third):
                await rig.reconciler.point("doctor", "default", revision, **who)
            await rig.agree()
            assert not rig.residency.is_resident(f"doctor@{first}")
            await rig.reconciler.point("doctor", "other", first, **who)
            await rig.reconciler.point("doctor", "more", fourth, **who)
            assert not rig.residency.is_resident(f"doctor@{second}"), "it makes room for what answers"
            await rig.agree()
            assert not rig.engine.broken_rules

    asyncio.run(asyncio.wait_for(check(), 60))


def test_more_aliases_than_fit_are_all_served_after_a_start(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, max_resident=2)
        for number, revision in enumerate(rig.revisions):
            rig.store.set_alias("doctor", f"v{number}", revision, actor="test")
        async with rig.running():
            assert len(rig.engine.held) == 2, "what does not fit is loaded when it is asked for"
            for number, revision in enumerate(rig.revisions):
                with await rig.residency.lease(rig.served.choose(f"doctor@v{number}").manifest) as lease:
                    assert lease.adapter
                    assert lease.adapter.name == f"doctor@{revision}"
            assert rig.engine.most_held == 2

    asyncio.run(asyncio.wait_for(check(), 60))


def test_a_revision_by_its_name_only_where_allowed(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, allow_revisions=True)
        async with rig.running():
            name = f"doctor@{rig.revisions[2]}"
            manifest = await rig.reconciler.published(name)
            assert manifest is not None
            with await rig.residency.lease(manifest):
                pass
            assert rig.residency.is_resident(name), "it may be asked for again"
            for unknown in ("doctor", "doctor@default", "doctor@000000000000", "no body"):
                assert await rig.reconciler.published(unknown) is None

    asyncio.run(asyncio.wait_for(check(), 60))


def test_a_new_canary_does_not_inherit_the_share_of_the_old_one(rig: Rig) -> None:
    async def check() -> None:
        rig.store.set_alias("doctor", "default", rig.revisions[0], actor="test")
        async with rig.running():
            who: dict[str, Any] = {"actor": "test", "why": ""}
            await rig.reconciler.split("doctor", CANARY, rig.revisions[1], 50, **who)
            await rig.reconciler.split("doctor", CANARY, rig.revisions[2], 1, **who)
        moves = [entry for entry in rig.store.log("doctor") if entry.alias == CANARY]
        assert [(entry.action, entry.percent) for entry in moves] == [
            ("point", None), ("split", 50), ("split", 0), ("point", None), ("split", 1),
        ]  # fmt: skip

    asyncio.run(check())


def test_an_alias_moved_to_a_reward_adapter_answers_no_more(rig: Rig, tmp_path: Path) -> None:
    async def check() -> None:
        rig.store.set_alias("doctor", "default", rig.revisions[0], actor="test")
        reward = make_folder(tmp_path / "reward", seed=60)
        assert reward.provenance is not None
        reward.provenance |= {"task": "reward"}
        reward.tensors[SCORE] = np.ones((1, 8), np.float32)
        async with rig.running():
            assert rig.actual() == rig.revisions[0]
            revision = rig.store.publish(reward.write(), "doctor", actor="test").revision
            rig.store.set_alias("doctor", "default", revision, actor="test")
            for _ in range(200):
                await asyncio.sleep(0.01)
                if rig.actual() is None:
                    break
            assert rig.actual() is None
            with pytest.raises(ModelNotFound):
                rig.served.choose("doctor")

    asyncio.run(asyncio.wait_for(check(), 30))


def test_what_lies_about_in_the_store_stops_nobody(rig: Rig) -> None:
    async def check() -> None:
        (rig.store.root / "No Adapter" / "aliases").mkdir(parents=True)
        (rig.store.root / "No Adapter" / "aliases" / "x").write_text("x")
        (rig.store.root / "doctor" / "aliases" / "a-folder").mkdir(parents=True)
        rig.store.set_alias("doctor", "default", rig.revisions[0], actor="test")
        async with rig.running():
            assert rig.actual() == rig.revisions[0]

    asyncio.run(check())


def test_not_allowed_by_default(rig: Rig) -> None:
    assert asyncio.run(rig.reconciler.published(f"doctor@{rig.revisions[0]}")) is None


def test_a_canary_needs_a_default(rig: Rig) -> None:
    async def check() -> None:
        async with rig.running():
            with pytest.raises(AdapterError, match="doctor@default"):
                await rig.reconciler.split("doctor", CANARY, rig.revisions[0], 10, actor="test", why="")
            assert rig.store.aliases("doctor") == {}

    asyncio.run(check())


def test_without_golden_prompts_nothing_is_served_unless_allowed(rig: Rig, tmp_path: Path) -> None:
    async def check() -> None:
        plain = make_folder(tmp_path / "plain", seed=50).write()
        async with rig.running():
            manifest = await rig.reconciler.publish(plain, "doctor", actor="test", why="")
            with pytest.raises(AdapterRefused, match="XINGLIN_ALLOW_UNPROVEN"):
                await rig.reconciler.point("doctor", "default", manifest.revision, actor="test", why="")
            assert rig.store.aliases("doctor") == {}

    asyncio.run(check())
