"""The storm passes on a correct service, and finds the faults of others."""

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterStore
from app.client.storm import add_parser, stage
from tests.adapters.folders import GOLDEN, make_folder
from tests.app.client.storm.fake_service import KEY, FakeService, serving
from tests.service import ADMIN_KEY, Service


def _storm(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    options = parser.parse_args(["swap-storm", *arguments])
    code: int = options.run(options)
    return code


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory whose store has two adapters with golden prompts."""
    store = AdapterStore(tmp_path / "data" / "store")
    for seed, name in enumerate(("doctor", "leaflet")):
        folder = make_folder(tmp_path / name, seed)
        folder.golden = [GOLDEN]
        manifest = store.publish(folder.write(), name, actor="test")
        store.set_alias(name, "default", manifest.revision, actor="test")
    return tmp_path / "data"


def _on_fake(
    url: str, data_dir: Path, tmp_path: Path, *more: str, key: str = KEY
) -> tuple[int, dict[str, Any] | None]:
    figures = tmp_path / "figures.json"
    code = _storm(
        "--url", url, "--key", key, "--data-dir", str(data_dir), "--swaps", "60", "--streams", "4",
        "--seconds", "0.3", "--json", str(figures), *more,
    )  # fmt: skip
    return code, json.loads(figures.read_text()) if figures.exists() else None


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.client.storm.load._WARM_UP_SECONDS", 0.2)
    monkeypatch.setattr("app.client.storm.actions._SHARE_SECONDS", 0.02)


def test_a_correct_service_passes(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = FakeService()
    with serving(service) as url:
        code, figures = _on_fake(url, data_dir, tmp_path)
    assert code == 0, capsys.readouterr()
    assert figures
    assert figures["swaps"] >= 60
    assert figures["answers"]["storm"]["requests"] > 60
    assert {"publish", "roll back", "promote a canary", "abort a canary"} <= figures["swaps_by_action"].keys()
    assert capsys.readouterr().out.splitlines()[-1] == "PASS"
    assert not service.aliases
    assert not [revision for revisions in service.published.values() for revision in revisions]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("stale", "by a wrong revision in the storm"),
        ("base", "by a wrong revision in the storm"),
        ("unlike", "matching no reference in the storm"),
        ("cut", "failed in the storm"),
        ("leak", "revisions leaked"),
        ("refuse", "admin calls refused"),
        ("sides", "sessions that changed sides"),
    ],
)
def test_faults_are_found(
    fault: str,
    told: str,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "_DRAIN_SECONDS", 1)
    with serving(FakeService(fault)) as url:
        code, _ = _on_fake(url, data_dir, tmp_path)
    assert code == 1
    assert told in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("fault", "told"), [("close", "times: connection closed before any byte"), ("cut", "times: cut: ended")]
)
def test_closed_connections_and_cut_answers_are_distinguished(
    fault: str,
    told: str,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "_DRAIN_SECONDS", 1)
    with serving(FakeService(fault)) as url:
        _on_fake(url, data_dir, tmp_path)
    assert told in capsys.readouterr().out


def test_one_original_is_enough(data_dir: Path, tmp_path: Path) -> None:
    store = AdapterStore(data_dir / "store")
    store.remove_alias("leaflet", "default", actor="test")
    store.prune("leaflet", keep=0, actor="test")
    with serving(FakeService()) as url:
        code, figures = _on_fake(url, data_dir, tmp_path, "--swaps", "10")
    assert code == 0
    assert figures
    assert "only doctor@" in figures["notes"][0]


@pytest.mark.parametrize("missing", ["service", "key", "adapters"])
def test_missing_prerequisites(
    missing: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(FakeService()) as url:
        code, figures = _on_fake(
            "http://127.0.0.1:9" if missing == "service" else url,
            tmp_path / "nothing" if missing == "adapters" else data_dir,
            tmp_path,
            key="wrong" if missing == "key" else KEY,
        )
    assert (code, figures) == (2, None)
    told = {"service": "no service answers", "key": "admin key is wrong", "adapters": "golden prompts"}
    assert told[missing] in capsys.readouterr().err


def test_ctrl_c_ends_it_with_a_report(data_dir: Path, tmp_path: Path) -> None:
    service = FakeService()

    def press() -> None:
        while service.chats < 300:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with serving(service) as url:
        presser = threading.Thread(target=press)
        presser.start()
        code, figures = _on_fake(url, data_dir, tmp_path, "--swaps", "100000")
        presser.join()
    assert code == 130
    assert figures
    assert 0 < figures["swaps"] < 100000
    assert not service.aliases


def test_the_real_service(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XINGLIN_ADMIN_KEY", ADMIN_KEY)
    before = service.adapters()
    figures = tmp_path / "figures.json"
    code = _storm(
        "--url", service.url, "--data-dir", str(service.data_dir), "--swaps", "12", "--streams", "8",
        "--seconds", "3", "--seed", "1", "--json", str(figures),
    )  # fmt: skip
    assert code == 0, capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["swaps"] >= 12
    assert found["service"]["load and proof"]["count"] > 3
    after = service.adapters()
    assert after.keys() == before.keys()
