"""What tests share: the demo's products, and one running service on them with the real vLLM engine."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING

import pytest

from tests import warm
from tests.service import ROOT, Service, free_port

if TYPE_CHECKING:
    from tests.trainer import Trainer

# Before torch is imported, here and in what tests start: threads that spin for work take the core from the others'.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

MAX_UPLOAD_BYTES = 16 << 20


_CHAINS = ("service, all else", "service, routes")
"""Groups of tests of the shared service, which take about as long."""


def pytest_configure() -> None:
    # A shell ignores SIGINT for what it starts in the background, and tests of Ctrl-C send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        warm.own()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        warm.disown()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n 2 --dist loadgroup`: what tests share is made seldom, and what takes long comes early.

    A group is run by one process: either chain, or another file. Those that do without the demo's products are first,
    while these are being made; then come the chains, since nothing can be done beside the end of one.
    """
    groups = {item: _group(item) for item in items}
    of_demo = {groups[item] for item in items if "demo_dir" in item.fixturenames}
    order = {name: place for place, name in enumerate(_CHAINS, start=1)}
    items.sort(key=lambda item: order.get(groups[item], 3) if groups[item] in of_demo else 0)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item]))


def _group(item: pytest.Item) -> str:
    if "service" in item.fixturenames and not hasattr(item.module, "service"):
        return _CHAINS[item.path.parent.name == "routes"]
    return str(item.path.relative_to(ROOT))


@pytest.fixture(scope="session")
def demo_dir(request: pytest.FixtureRequest) -> Path:
    """The demo's data directory. Kept between test sessions: the demo rebuilds what has changed."""
    folder = ROOT / ".cache" / "demo"
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # it takes minutes the first time: show how it goes
        print("\nthe demo's models, kept for the next time:", flush=True)
        subprocess.run([sys.executable, "-m", "training", "demo", "--data-dir", folder], check=True, cwd=ROOT)
    return folder


@pytest.fixture
def data_dir(demo_dir: Path, tmp_path: Path) -> Path:
    """A copy of the demo's products that a test may change."""
    return copy_products(demo_dir, tmp_path / "data")


def copy_products(source: Path, target: Path) -> Path:
    """Copy what a service needs: the base model and the store."""
    for part in ("models", "store"):
        copytree(source / part, target / part)
    return target


@pytest.fixture(scope="session")
def service(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for the whole session. Tests leave its aliases `default` of doctor and leaflet as they were."""
    folder = tmp_path_factory.mktemp("service")
    if "PYTEST_XDIST_WORKER" in os.environ:
        _count_start(folder.parent.parent)
    data_dir = copy_products(demo_dir, folder / "data")
    # Small uploads only, so that too large a one is soon made.
    service = Service(data_dir, free_port(), {"XINGLIN_MAX_ADAPTER_GIB": str(MAX_UPLOAD_BYTES / 2**30)})
    service.start()
    yield service
    engines = service.engine_pids()
    exit_code = service.stop()
    assert engines, "the service ran no engine process that a test could look for"
    assert exit_code == 0, service.log[-4000:]
    assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()], "an engine outlived its service"


def _count_start(folder: Path) -> None:
    """Of the shared service, in any process. A third means that groups do not work."""
    for start in ("first", "second"):
        with suppress(FileExistsError):
            return (folder / f"{start}-service").mkdir()
    raise AssertionError("the shared service was started a third time")


@pytest.fixture(scope="session")
def trainer(demo_dir: Path) -> "Trainer":
    from tests.trainer import Trainer  # noqa: PLC0415 - it takes seconds, which most tests do without

    return Trainer(demo_dir)
