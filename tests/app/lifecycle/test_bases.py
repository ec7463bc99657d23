"""Several base models: the choice of base model for each adapter, and independence of the engines."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from adapters import AdapterRef, InvalidAdapter, write_golden
from app.engine.supervisor import BaseStatus
from app.errors import AdapterRefused, AdapterUnavailable, ModelNotFound
from tests.adapters.folders import BASE, GOLDEN, Folder, make_folder
from tests.app.fake_engine import FakeEngine
from tests.app.lifecycle.rig import Rig, until

OTHER = replace(BASE, name="other", fingerprint="f" * 16)


def trained_on(path: Path, fingerprint: str | None, seed: int = 0) -> Folder:
    folder = make_folder(path, seed)
    assert folder.provenance is not None
    folder.provenance |= {
        "base_fingerprint": fingerprint,
        "base_model": "other" if fingerprint != BASE.fingerprint else "tiny",
    }
    return folder


class TwoBases(Rig):
    """Two base models, and one store with an adapter of each: `doctor` of tiny, `nurse` of other."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, (BASE, OTHER))
        self.folder = folder
        for name, fingerprint in (("doctor", BASE.fingerprint), ("nurse", OTHER.fingerprint)):
            path = trained_on(folder / name, fingerprint).write()
            write_golden(path / "golden.jsonl", [GOLDEN])
            revision = self.store.publish(path, name, actor="test").revision
            self.store.set_alias(name, "default", revision, actor="test")
        self.tiny, self.other = self.bases


@pytest.fixture
def rig(tmp_path: Path) -> TwoBases:
    return TwoBases(tmp_path)


def test_each_adapter_loads_on_its_own_base_model(rig: TwoBases) -> None:
    async def check() -> None:
        tiny, other = FakeEngine(), FakeEngine(OTHER)
        async with rig.running():
            await rig.start("tiny", tiny)
            await rig.become(doctor="ready", nurse="loading")
            with pytest.raises(AdapterUnavailable):
                rig.served.choose("nurse")
            await rig.start("other", other)
            await rig.become(doctor="ready", nurse="ready")
            assert [one.name.partition("@")[0] for one in tiny.held.values()] == ["doctor"]
            assert [one.name.partition("@")[0] for one in other.held.values()] == ["nurse"]
            choice = rig.served.choose("nurse")
            assert choice.manifest is not None
            assert rig.bases.of(choice.manifest) is rig.other

    asyncio.run(check())


def test_a_dead_engine_affects_only_its_own_adapters(rig: TwoBases) -> None:
    async def check() -> None:
        tiny, other = FakeEngine(), FakeEngine(OTHER)
        async with rig.running():
            await rig.start("tiny", tiny)
            await rig.start("other", other)
            await rig.become(doctor="ready", nurse="ready")
            other.is_dead = True
            await rig.become(doctor="ready", nurse="loading")
            assert rig.served.choose("doctor").manifest
            with pytest.raises(AdapterUnavailable):
                rig.served.choose("nurse")
            await asyncio.sleep(0.05)  # several rounds of the reconciler
            assert rig.statuses() == {"doctor": "ready", "nurse": "loading"}
            assert tiny.loads.total() == 1
            await rig.start("other", FakeEngine(OTHER))
            await rig.become(doctor="ready", nurse="ready")
        assert tiny.loads.total() == 1
        assert not tiny.broken_rules

    asyncio.run(check())


def test_adapters_are_validated_against_their_own_base_model(rig: TwoBases) -> None:
    async def check() -> None:
        async with rig.running():
            await rig.start("tiny", FakeEngine())
            await rig.start("other", FakeEngine(OTHER))
            good = trained_on(rig.folder / "new", OTHER.fingerprint, seed=5).write()
            write_golden(good / "golden.jsonl", [GOLDEN])
            manifest = await rig.operations.publish(good, "new", actor="test", why="")
            await rig.operations.point("new", "default", manifest.revision, actor="test", why="")
            assert rig.other.residency.is_resident(f"new@{manifest.revision}")
            assert not rig.tiny.residency.is_resident(f"new@{manifest.revision}")

            bad = trained_on(rig.folder / "bad", "0" * 16, seed=6).write()
            with pytest.raises(
                AdapterRefused, match=f"runs tiny@{BASE.fingerprint}, other@{OTHER.fingerprint}"
            ):
                await rig.operations.publish(bad, "bad", actor="test", why="")
            wide = trained_on(rig.folder / "wide", OTHER.fingerprint, seed=7)
            wide.config["r"] = 64
            with pytest.raises(InvalidAdapter):
                await rig.operations.publish(wide.write(), "wide", actor="test", why="")
            for name in ("tiny", "other"):
                with pytest.raises(AdapterRefused, match="name of a base model"):
                    await rig.operations.publish(good, name, actor="test", why="")

    asyncio.run(check())


def test_an_adapter_of_an_unknown_base_model_fails(rig: TwoBases) -> None:
    async def check() -> None:
        path = trained_on(rig.folder / "lost", "0" * 16, seed=8).write()
        write_golden(path / "golden.jsonl", [GOLDEN])
        rig.store.set_alias(
            "lost", "default", rig.store.publish(path, "lost", actor="test").revision, actor="test"
        )
        async with rig.running():
            await rig.start("tiny", FakeEngine())
            await rig.start("other", FakeEngine(OTHER))
            await rig.become(doctor="ready", nurse="ready", lost="failed")
            lost = rig.served.alias("lost", "default")
            assert lost is not None
            assert "fingerprint 0000000000000000" in str(lost.last_error)
            with pytest.raises(ModelNotFound):
                rig.served.choose("nobody")

    asyncio.run(check())


def test_without_a_fingerprint_the_named_or_first_base_model_is_used(rig: TwoBases) -> None:
    named = trained_on(rig.folder / "named", None).write()
    manifest = rig.store.publish(named, "named", actor="test")
    assert rig.bases.of(manifest) is rig.other
    assert rig.bases.of(manifest.model_copy(update={"base_model": None})) is rig.tiny


def test_the_name_decides_between_base_models_with_one_fingerprint(rig: TwoBases) -> None:
    trained = rig.store.get(AdapterRef("nurse"))
    assert trained.base_model == "other"
    rig.tiny.supervisor.facts = replace(BASE, fingerprint=OTHER.fingerprint)
    with pytest.raises(AdapterUnavailable):
        rig.bases.of(trained)
    rig.other.supervisor.facts = OTHER
    assert rig.bases.of(trained) is rig.other
    assert rig.bases.of(trained.model_copy(update={"base_model": "a copy of it"})) is rig.tiny


def test_adapters_do_not_wait_for_a_failed_base_model(rig: TwoBases) -> None:
    trained = rig.store.get(AdapterRef("nurse"))

    async def check() -> None:
        async with rig.running():
            await rig.start("tiny", FakeEngine(replace(OTHER, name="tiny")))
            with pytest.raises(AdapterUnavailable):
                rig.bases.of(trained)
            rig.give("other", ValueError("its folder is not there"))
            await until(lambda: rig.other.supervisor.state.status is BaseStatus.FAILED)
            assert rig.bases.of(trained) is rig.tiny
            assert not rig.has_given_up

    asyncio.run(check())
