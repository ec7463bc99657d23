"""One contract for vLLM's engine and for the fake engine of the tests."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from adapters import write_golden
from tests.adapters.folders import GOLDEN, make_folder
from tests.app.engine.contract import Rig, hold_to
from tests.app.fake_engine import FakeEngine
from tests.service import ROOT


def test_the_fake_engine_keeps_the_contract(tmp_path: Path) -> None:
    good = make_folder(tmp_path / "good").write()
    write_golden(good / "golden.jsonl", [GOLDEN])
    (tmp_path / "bad").mkdir()
    refused = make_folder(tmp_path / "bad" / "adapter").write()
    (tmp_path / "bad" / "refuse-to-load").touch()
    asyncio.run(hold_to(Rig(FakeEngine(), good, refused, tolerance=1e-9)))


def test_vllm_keeps_the_contract(demo_dir: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.app.engine.contract", demo_dir],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert result.stdout.strip().endswith("kept"), result.stderr[-3000:]
