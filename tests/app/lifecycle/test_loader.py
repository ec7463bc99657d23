"""Loading passes an adapter's own chat template and stop strings to the engine; on a fake engine."""

import asyncio
from pathlib import Path

import pytest

from adapters import AdapterStore, read_golden
from app.engine.base import LoadedAdapter
from app.errors import AdapterRefused, ProofFailed
from app.lifecycle.loader import Loader, Staged
from app.metrics import Metrics
from tests.adapters.folders import GOLDEN, make_folder
from tests.app.fake_engine import FakeEngine

TEMPLATE = "{% for m in messages %}问: {{ m.content }}\n{% endfor %}答: "


class Rig:
    """A loader, its store, and a folder to publish there."""

    def __init__(self, path: Path) -> None:
        self.engine = FakeEngine()
        self.recorded = path / "recorded"
        self.store = AdapterStore(path / "store")
        self.loader = Loader(self.store, Metrics(), recorded_dir=self.recorded, allow_unproven=True)
        self.folder = make_folder(path / "folder")
        self.folder.golden = [GOLDEN.model_copy(update={"prompt_token_ids": [*map(ord, TEMPLATE)]})]
        self.folder.others["chat_template.jinja"] = TEMPLATE.encode()

    def load(self, *, stop: tuple[str, ...] = ()) -> LoadedAdapter:
        assert self.folder.provenance is not None
        self.folder.provenance["stop"] = [*stop]
        manifest = self.store.publish(self.folder.write(), "doctor", actor="test")
        staged = self.loader.stage(self.engine, manifest)
        return asyncio.run(self._load(staged))

    async def _load(self, staged: Staged) -> LoadedAdapter:
        loaded = await self.loader.load(self.engine, staged)
        await self.loader.prove(self.engine, loaded, staged)
        return loaded


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_template_and_stop_strings_go_to_the_engine(rig: Rig) -> None:
    loaded = rig.load(stop=("\n问:", "###"))
    assert (loaded.template, loaded.stop) == (TEMPLATE, ("\n问:", "###"))
    assert rig.engine.held == {loaded.engine_id: loaded}


def test_an_adapter_without_template_and_stop_strings(rig: Rig) -> None:
    rig.folder.others.clear()
    rig.folder.golden = [GOLDEN]
    loaded = rig.load()
    assert (loaded.template, loaded.stop) == (None, ())


def test_golden_prompts_need_their_template(rig: Rig) -> None:
    rig.folder.others.clear()
    with pytest.raises(ProofFailed, match=r"publish it with the chat_template\.jinja it was trained with"):
        rig.load()
    assert not rig.engine.held


def test_a_template_must_match_the_golden_prompts(rig: Rig) -> None:
    rig.folder.golden = [GOLDEN]
    with pytest.raises(ProofFailed, match="chat template renders other tokens"):
        rig.load()
    assert not rig.engine.held


def test_a_template_that_does_not_compile(rig: Rig) -> None:
    rig.folder.others["chat_template.jinja"] = b"{% for m in messages %}"
    with pytest.raises(AdapterRefused):
        rig.load()
    assert not rig.engine.held


def test_an_unproven_adapter_is_recorded_with_its_own_template(rig: Rig) -> None:
    rig.folder.golden = []
    rig.load()
    (path,) = rig.recorded.rglob("*.jsonl")
    assert {tuple(prompt.prompt_token_ids) for prompt in read_golden(path)} == {tuple(map(ord, TEMPLATE))}
