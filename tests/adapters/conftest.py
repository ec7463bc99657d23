"""Fixtures: a small valid adapter folder to change, a store, and a way to start other processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapters import AdapterStore
from tests.adapters.folders import NAME, SCORE, WHO, Folder, make_folder, publish

ROOT = Path(__file__).parents[2]

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def _fsync_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which is slow and only matters after a power loss; its one test records the calls instead."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def adapter(tmp_path: Path) -> Folder:
    return make_folder(tmp_path / "adapter")


@pytest.fixture
def reward(tmp_path: Path) -> Folder:
    """A reward adapter: LoRA pairs and a score head."""
    folder = make_folder(tmp_path / "reward")
    folder.provenance = {"stage": "rm", "task": "reward"}
    folder.config |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    folder.tensors[SCORE] = np.ones((1, 8), np.float32)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def revisions(store: AdapterStore, tmp_path: Path) -> list[str]:
    """Four published revisions; `default` pointed at each in turn."""
    made = [publish(store, tmp_path, seed) for seed in range(4)]
    for revision in made:
        store.set_alias(NAME, "default", revision, actor=WHO)
    return made


@pytest.fixture
def start() -> Start:
    """Start Python as a separate process that can import `adapters`."""

    def start(*arguments: str | Path, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    return start
