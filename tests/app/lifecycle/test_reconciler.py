"""Operators, other writers of the store, requests and failures: store, service and engine stay consistent."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import CANARY, AdapterError, AdapterRef, Traffic, write_golden
from app.engine.base import Endpoint, Unobserved
from app.errors import AdapterRefused, AdapterUnavailable, ApiError, ModelNotFound
from tests.adapters.folders import GOLDEN, SCORE, make_folder
from tests.app.fake_engine import FakeEngine
from tests.app.lifecycle.rig import Rig, until

REVISIONS = 5


class OneBase(Rig):
    """One base model, and a store with several revisions of `doctor`."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.revisions = []
        for seed in range(REVISIONS):
            path = make_folder(folder / str(seed), seed=seed).write()
            write_golden(path / "golden.jsonl", [GOLDEN])
            self.revisions.append(self.store.publish(path, "doctor", actor="test").revision)
        self.engine = FakeEngine()
        self.residency = self.base.residency

    @asynccontextmanager
    async def running(self) -> AsyncIterator["OneBase"]:
        async with super().running():
            await self.start("tiny", self.engine)
            yield self

    def break_revision(self, revision: str) -> None:
        (self.store.folder("doctor", revision) / "adapter_model.safetensors").write_bytes(b"broken")

    def actual(self, alias: str = "default") -> str | None:
        manifest = self.served.find(AdapterRef("doctor", alias=alias))
        return manifest.revision if manifest else None

    async def agree(self) -> None:
        """Wait until the store, the statuses, the answers and the engine are consistent."""
        for _ in range(400):
            await asyncio.sleep(0.01)
            aliases = self.store.aliases("doctor")
            for alias in aliases:  # an evicted revision is back at its next request
                if manifest := self.served.find(AdapterRef("doctor", alias=alias)):
                    with await self.residency.lease(manifest):
                        pass
            status = {alias: one.actual for (_, alias), one in self.served.aliases()}
            served = {alias: self.actual(alias) for alias in aliases}
            held = {adapter.name for adapter in self.engine.held.values()}
            pointed = {f"doctor@{revision}" for revision in aliases.values()}
            traffic = self.served.traffic("doctor") or Traffic()
            previous = (one.previous for _, one in self.served.aliases())
            kept = {manifest.ref for manifest in previous if manifest}
            is_tidy = pointed <= held <= pointed | kept
            if aliases == status == served and is_tidy and traffic == self.store.traffic("doctor"):
                return
        raise AssertionError((aliases, status, served, held))


@pytest.fixture
def rig(tmp_path: Path) -> OneBase:
    return OneBase(tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_concurrent_operators_writers_and_requests(rig: OneBase, seed: int) -> None:
    choice = random.Random(seed)
    who: dict[str, Any] = {"actor": "test", "why": ""}

    async def operate() -> None:
        operations = rig.operations
        for _ in range(25):
            revision = choice.choice(rig.revisions)
            call = choice.choice(
                [
                    lambda r=revision: operations.point("doctor", "default", r, **who),
                    lambda r=revision: operations.rollback(
                        "doctor", "default", to=choice.choice([None, r]), **who
                    ),
                    lambda r=revision: operations.split("doctor", CANARY, r, choice.randrange(101), **who),
                    lambda: operations.promote("doctor", **who),
                    lambda: operations.remove("doctor", CANARY, **who),
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
                        fingerprint="", observer=Unobserved(),
                    )  # fmt: skip
                assert isinstance(answer.reply, dict)
                assert chosen.manifest
                assert (
                    answer.reply["choices"][0]["message"]["content"] == f"doctor@{chosen.manifest.revision}"
                )
            except (ModelNotFound, AdapterUnavailable):
                pass  # without an alias for a moment
            await asyncio.sleep(choice.random() * 0.004)

    async def check() -> None:
        rig.store.set_alias("doctor", "default", rig.revisions[0], actor="test")
        async with rig.running():
            rig.engine.seconds = 0.001
            await asyncio.gather(operate(), operate(), write_elsewhere(), *(ask() for _ in range(6)))
            await rig.agree()
            assert not rig.engine.broken_rules

    asyncio.run(asyncio.wait_for(check(), 60))


def test_a_revision_damaged_on_disk_falls_back_at_its_reload(tmp_path: Path) -> None:
    """Evicted, then damaged, then requested: the previous revision answers, and the status says why."""

    async def check() -> None:
        rig = OneBase(tmp_path, max_resident=2)
        first, second, *others = rig.revisions
        for revision in (first, second):
            rig.store.set_alias("doctor", "default", revision, actor="test")
        for alias, revision in zip(("a", "b"), others, strict=False):
            rig.store.set_alias("doctor", alias, revision, actor="test")
        async with rig.running():
            for alias in ("a", "b"):  # others take both places now
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
            known = rig.served.alias("doctor", "default")
            assert known is not None
            assert (known.desired, known.actual, rig.statuses()["doctor"]) == (second, first, "failed")
            assert "changed after it was published" in str(known.last_error)
            with await rig.residency.lease(rig.served.choose("doctor").manifest) as lease:
                assert lease.manifest
                assert lease.manifest.revision == first
            assert not rig.engine.broken_rules

    asyncio.run(asyncio.wait_for(check(), 60))


def test_the_previous_revision_stays_while_there_is_room(tmp_path: Path) -> None:
    """A rollback loads nothing; a revision that no rollback needs any more is removed."""

    async def check() -> None:
        rig = OneBase(tmp_path)
        first, second, third, fourth, _ = rig.revisions
        who: dict[str, Any] = {"actor": "test", "why": ""}
        rig.store.set_alias("doctor", "default", first, actor="test")
        async with rig.running():
            await rig.operations.point("doctor", "default", second, **who)
            await rig.agree()
            assert rig.residency.is_resident(f"doctor@{first}")
            loads = rig.engine.loads.total()
            assert await rig.operations.rollback("doctor", "default", to=None, **who) == first
            assert rig.engine.loads.total() == loads
            await rig.agree()
            assert not rig.residency.is_resident(f"doctor@{second}"), "rolled back from, it is not wanted"
            for revision in (second, third):
                await rig.operations.point("doctor", "default", revision, **who)
            await rig.agree()
            assert not rig.residency.is_resident(f"doctor@{first}")
            await rig.operations.point("doctor", "other", first, **who)
            await rig.operations.point("doctor", "more", fourth, **who)
            assert not rig.residency.is_resident(f"doctor@{second}"), "it makes room for what answers"
            await rig.agree()
            assert not rig.engine.broken_rules

    asyncio.run(asyncio.wait_for(check(), 60))


def test_more_aliases_than_fit_are_all_served_after_a_start(tmp_path: Path) -> None:
    async def check() -> None:
        rig = OneBase(tmp_path, max_resident=2)
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


def test_revisions_are_served_by_name_only_if_allowed(tmp_path: Path) -> None:
    async def check() -> None:
        rig = OneBase(tmp_path, allow_revisions=True)
        async with rig.running():
            name = f"doctor@{rig.revisions[2]}"
            manifest = await rig.operations.published(name)
            assert manifest is not None
            with await rig.residency.lease(manifest):
                pass
            assert rig.residency.is_resident(name), "it may be asked for again"
            for unknown in ("doctor", "doctor@default", "doctor@000000000000", "no body"):
                assert await rig.operations.published(unknown) is None

    asyncio.run(asyncio.wait_for(check(), 60))


def test_a_new_canary_does_not_inherit_the_share_of_the_old_one(rig: OneBase) -> None:
    async def check() -> None:
        rig.store.set_alias("doctor", "default", rig.revisions[0], actor="test")
        async with rig.running():
            who: dict[str, Any] = {"actor": "test", "why": ""}
            await rig.operations.split("doctor", CANARY, rig.revisions[1], 50, **who)
            await rig.operations.split("doctor", CANARY, rig.revisions[2], 1, **who)
        moves = [entry for entry in rig.store.log("doctor") if entry.alias == CANARY]
        assert [(entry.action, entry.percent) for entry in moves] == [
            ("point", None), ("split", 50), ("split", 0), ("point", None), ("split", 1),
        ]  # fmt: skip

    asyncio.run(check())


def test_an_alias_moved_to_a_reward_adapter_stops_answering(rig: OneBase, tmp_path: Path) -> None:
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


def test_stray_files_in_the_store_are_ignored(rig: OneBase) -> None:
    async def check() -> None:
        (rig.store.root / "No Adapter" / "aliases").mkdir(parents=True)
        (rig.store.root / "No Adapter" / "aliases" / "x").write_text("x")
        (rig.store.root / "doctor" / "aliases" / "a-folder").mkdir(parents=True)
        rig.store.set_alias("doctor", "default", rig.revisions[0], actor="test")
        async with rig.running():
            assert rig.actual() == rig.revisions[0]

    asyncio.run(check())


def test_each_status_in_turn(rig: OneBase) -> None:
    """Statuses of an alias that another process moves, and of its revisions while the previous one is in use."""
    aliases: list[str] = []
    revisions: dict[str, list[str]] = {}

    def note() -> bool:
        for seen, status in [
            (aliases, rig.statuses().get("doctor")),
            *((revisions.setdefault(ref, []), one) for ref, one in rig.residency.statuses().items()),
        ]:
            if status and status not in seen[-1:]:
                seen.append(str(status))
        return aliases[-1:] == ["ready"]

    async def check() -> None:
        first, second, *_ = rig.revisions
        rig.engine.seconds = 0.05
        rig.store.set_alias("doctor", "default", first, actor="elsewhere")
        async with rig.running():
            with await rig.residency.lease(rig.served.choose("doctor").manifest):
                note()
                rig.store.set_alias("doctor", "default", second, actor="elsewhere")
                await until(lambda: not note())
                await until(note)
                assert rig.residency.statuses()[f"doctor@{first}"] == "draining"
            await until(lambda: note() and rig.residency.statuses()[f"doctor@{first}"] == "ready")
            rig.break_revision(rig.revisions[2])
            rig.store.set_alias("doctor", "default", rig.revisions[2], actor="elsewhere")
            await until(lambda: not note() and aliases[-1] == "failed")
        assert aliases[:4] == ["ready", "loading", "proving", "ready"]
        assert revisions[f"doctor@{first}"][:3] == ["ready", "draining", "ready"]
        assert revisions[f"doctor@{second}"][:3] == ["loading", "proving", "ready"]

    asyncio.run(asyncio.wait_for(check(), 60))


def test_not_allowed_by_default(rig: OneBase) -> None:
    assert asyncio.run(rig.operations.published(f"doctor@{rig.revisions[0]}")) is None


def test_a_canary_needs_a_default(rig: OneBase) -> None:
    async def check() -> None:
        async with rig.running():
            with pytest.raises(AdapterError, match="doctor@default"):
                await rig.operations.split("doctor", CANARY, rig.revisions[0], 10, actor="test", why="")
            assert rig.store.aliases("doctor") == {}

    asyncio.run(check())


def test_without_golden_prompts_nothing_is_served_unless_allowed(rig: OneBase, tmp_path: Path) -> None:
    async def check() -> None:
        plain = make_folder(tmp_path / "plain", seed=50).write()
        async with rig.running():
            manifest = await rig.operations.publish(plain, "doctor", actor="test", why="")
            with pytest.raises(AdapterRefused, match="XINGLIN_ALLOW_UNPROVEN"):
                await rig.operations.point("doctor", "default", manifest.revision, actor="test", why="")
            assert rig.store.aliases("doctor") == {}

    asyncio.run(check())
