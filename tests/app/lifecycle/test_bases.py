"""Several base models: which adapter belongs to which, and what each one's engine has to do with the others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from adapters import AdapterRef, AdapterStore, InvalidAdapter, write_golden
from app.errors import AdapterRefused, AdapterUnavailable, ModelNotFound
from app.lifecycle.bases import Host, Hosts
from app.lifecycle.loader import Loader
from app.lifecycle.reconciler import Reconciler
from app.lifecycle.residency import Limits, Residency
from app.lifecycle.served_models import ServedModels
from app.metrics import Metrics
from tests.adapters.folders import BASE, GOLDEN, Folder, make_folder
from tests.app.fake_engine import FakeEngine

OTHER = replace(BASE, name="other", fingerprint="f" * 16)


def trained_on(path: Path, fingerprint: str | None, seed: int = 0) -> Folder:
    folder = make_folder(path, seed)
    assert folder.provenance is not None
    folder.provenance |= {
        "base_fingerprint": fingerprint,
        "base_model": "other" if fingerprint != BASE.fingerprint else "tiny",
    }
    return folder


class Rig:
    """Two base models on fake engines, and one store with an adapter of each: `doctor` of tiny, `nurse` of other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = AdapterStore(folder / "store")
        for name, fingerprint in (("doctor", BASE.fingerprint), ("nurse", OTHER.fingerprint)):
            path = trained_on(folder / name, fingerprint).write()
            write_golden(path / "golden.jsonl", [GOLDEN])
            revision = self.store.publish(path, name, actor="test").revision
            self.store.set_alias(name, "default", revision, actor="test")
        metrics = Metrics()
        self.served = ServedModels(["tiny", "other"])
        limits = Limits(max_resident=3, max_resident_bytes=2**30, max_loras=2, wait_seconds=10)

        def residency() -> Residency:
            loader = Loader(self.store, metrics, recorded_dir=folder / "recorded", allow_unproven=False)
            return Residency(self.store, metrics, limits, loader, is_wanted=self.served.is_wanted)

        self.tiny, self.other = Host("tiny", residency()), Host("other", residency())
        self.hosts = Hosts([self.tiny, self.other])
        self.reconciler = Reconciler(
            self.store, self.served, self.hosts, metrics, allow_revisions=False, interval=0.01
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        task = asyncio.create_task(self.reconciler.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def states(self) -> dict[str, str]:
        return {name: status.state for (name, _), status in self.reconciler.status.items()}

    async def become(self, **states: str) -> None:
        for _ in range(300):
            if self.states() == states:
                return
            await asyncio.sleep(0.01)
        raise AssertionError((self.states(), self.reconciler.status))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_each_adapter_goes_to_the_base_it_was_trained_on(rig: Rig) -> None:
    async def check() -> None:
        tiny, other = FakeEngine(), FakeEngine(OTHER)
        async with rig.running():
            await rig.reconciler.attach(rig.tiny, tiny)
            await rig.become(doctor="ready", nurse="waiting")
            with pytest.raises(AdapterUnavailable):
                rig.served.choose("nurse")
            await rig.reconciler.attach(rig.other, other)
            await rig.become(doctor="ready", nurse="ready")
        assert [one.name.partition("@")[0] for one in tiny.held.values()] == ["doctor"]
        assert [one.name.partition("@")[0] for one in other.held.values()] == ["nurse"]
        choice = rig.served.choose("nurse")
        assert choice.manifest is not None
        assert rig.hosts.of(choice.manifest) is rig.other

    asyncio.run(check())


def test_an_engine_that_dies_takes_only_its_own_adapters_along(rig: Rig) -> None:
    async def check() -> None:
        tiny, other = FakeEngine(), FakeEngine(OTHER)
        async with rig.running():
            await rig.reconciler.attach(rig.tiny, tiny)
            await rig.reconciler.attach(rig.other, other)
            await rig.become(doctor="ready", nurse="ready")
            other.is_dead = True
            await rig.reconciler.detach(rig.other)
            await rig.become(doctor="ready", nurse="waiting")
            assert rig.served.choose("doctor").manifest
            with pytest.raises(AdapterUnavailable):
                rig.served.choose("nurse")
            await asyncio.sleep(0.05)  # rounds of following the store
            assert rig.states() == {"doctor": "ready", "nurse": "waiting"}
            assert tiny.loads.total() == 1
            await rig.reconciler.attach(rig.other, FakeEngine(OTHER))
            await rig.become(doctor="ready", nurse="ready")
        assert tiny.loads.total() == 1
        assert not tiny.broken_rules

    asyncio.run(check())


def test_what_is_published_is_held_against_its_own_base(rig: Rig) -> None:
    async def check() -> None:
        await rig.reconciler.attach(rig.tiny, FakeEngine())
        await rig.reconciler.attach(rig.other, FakeEngine(OTHER))
        good = trained_on(rig.folder / "new", OTHER.fingerprint, seed=5).write()
        write_golden(good / "golden.jsonl", [GOLDEN])
        manifest = await rig.reconciler.publish(good, "new", actor="test", why="")
        await rig.reconciler.point("new", "default", manifest.revision, actor="test", why="")
        assert rig.other.residency.is_resident(f"new@{manifest.revision}")
        assert not rig.tiny.residency.is_resident(f"new@{manifest.revision}")

        bad = trained_on(rig.folder / "bad", "0" * 16, seed=6).write()
        with pytest.raises(AdapterRefused, match=f"runs tiny@{BASE.fingerprint}, other@{OTHER.fingerprint}"):
            await rig.reconciler.publish(bad, "bad", actor="test", why="")
        wide = trained_on(rig.folder / "wide", OTHER.fingerprint, seed=7)
        wide.config["r"] = 64
        with pytest.raises(InvalidAdapter):
            await rig.reconciler.publish(wide.write(), "wide", actor="test", why="")
        for name in ("tiny", "other"):
            with pytest.raises(AdapterRefused, match="name of a base model"):
                await rig.reconciler.publish(good, name, actor="test", why="")

    asyncio.run(check())


def test_an_adapter_of_a_base_that_is_not_here_says_so(rig: Rig) -> None:
    async def check() -> None:
        path = trained_on(rig.folder / "lost", "0" * 16, seed=8).write()
        write_golden(path / "golden.jsonl", [GOLDEN])
        rig.store.set_alias(
            "lost", "default", rig.store.publish(path, "lost", actor="test").revision, actor="test"
        )
        async with rig.running():
            await rig.reconciler.attach(rig.tiny, FakeEngine())
            await rig.reconciler.attach(rig.other, FakeEngine(OTHER))
            await rig.become(doctor="ready", nurse="ready", lost="failed")
        assert "fingerprint 0000000000000000" in str(rig.reconciler.status["lost", "default"].last_error)
        with pytest.raises(ModelNotFound):
            rig.served.choose("nobody")

    asyncio.run(check())


def test_one_that_does_not_say_belongs_to_the_base_it_names_or_to_the_first(rig: Rig) -> None:
    named = trained_on(rig.folder / "named", None).write()
    manifest = rig.store.publish(named, "named", actor="test")
    assert rig.hosts.of(manifest) is rig.other
    assert rig.hosts.of(manifest.model_copy(update={"base_model": None})) is rig.tiny


def test_between_bases_of_one_structure_the_name_decides(rig: Rig) -> None:
    trained = rig.store.get(AdapterRef("nurse"))
    assert trained.base_model == "other"
    rig.tiny.facts = replace(BASE, fingerprint=OTHER.fingerprint)
    with pytest.raises(AdapterUnavailable):
        rig.hosts.of(trained)
    rig.other.facts = OTHER
    assert rig.hosts.of(trained) is rig.other
    assert rig.hosts.of(trained.model_copy(update={"base_model": "a copy of it"})) is rig.tiny
    rig.other.facts, rig.other.failure = None, "its folder is not there"
    assert rig.hosts.of(trained) is rig.tiny
