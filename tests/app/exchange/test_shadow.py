"""The comparisons that a shadow writes."""

import asyncio
import json
from pathlib import Path

import pytest

from adapters import AdapterRef, write_golden
from app.exchange.observers import Texts
from app.exchange.shadow import Original, Shadow
from tests.adapters.folders import GOLDEN, make_folder
from tests.app.fake_engine import FakeEngine
from tests.app.lifecycle.rig import Rig, until


@pytest.mark.parametrize("name", ["doctor", "my-org/Doctor"])
def test_a_copy_is_answered_and_compared(name: str, tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path)
        for seed, alias in enumerate(("default", "shadow")):
            folder = make_folder(tmp_path / alias, seed=seed).write()
            write_golden(folder / "golden.jsonl", [GOLDEN])
            revision = rig.store.publish(folder, name, actor="test").revision
            rig.store.set_alias(name, alias, revision, actor="test")
        answered_by, shadow_of = (
            rig.store.get(AdapterRef(name, alias=alias)) for alias in ("default", "shadow")
        )
        shadow = Shadow(tmp_path / "comparisons", rig.bases, rig.metrics, keep_texts=True)
        async with rig.running():
            await rig.start("tiny", FakeEngine())
            with await rig.base.residency.lease(shadow_of), await rig.base.residency.lease(answered_by):
                pass
            texts = Texts()
            texts.wrote(0, answered_by.ref, 1)
            running = asyncio.create_task(shadow.run())
            body = {"model": name, "messages": []}
            shadow.offer(Original("r1", body, answered_by, shadow_of, texts, 0.0))
            await until(lambda: [*(tmp_path / "comparisons").rglob("*.jsonl")] != [])
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        shadow.close()
        (path,) = (tmp_path / "comparisons").rglob("*.jsonl")
        row = json.loads(path.read_text())
        assert (row["answered_by"], row["shadow"]) == (answered_by.revision, shadow_of.revision)
        assert (row["texts"], row["shadow_texts"]) == ([answered_by.ref], [shadow_of.ref])
        assert row["same"] is False

    asyncio.run(asyncio.wait_for(check(), 60))
