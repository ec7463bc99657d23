"""Concurrent publishers, operators and other processes, with kill -9 at any moment."""

import gc
import http.client
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterError, AdapterStore
from tests.app.spoilt import QUESTION, asked, demo_folder, engine_starts, publish
from tests.conftest import copy_products
from tests.service import ROOT, Service, free_port

PUBLISHERS, CONTENTS = 50, 5
OPERATORS, SECONDS = 8, 6
KILLED_PUBLISHERS = 20
KILLS = int(os.environ.get("XINGLIN_TEST_KILLS", "1"))


@pytest.fixture(scope="module")
def service(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for this module alone, since one of the tests kills it."""
    service = Service(copy_products(demo_dir, tmp_path_factory.mktemp("races") / "data"), free_port())
    service.start()
    yield service
    assert service.stop() == 0, service.log[-4000:]


@pytest.fixture(scope="module")
def store(service: Service) -> AdapterStore:
    return AdapterStore(service.data_dir / "store")


@pytest.fixture(scope="module")
def folders(service: Service, store: AdapterStore) -> list[Path]:
    return [content(service, store, number) for number in range(CONTENTS)]


@pytest.fixture(autouse=True)
def answers(service: Service, store: AdapterStore) -> Iterator[dict[str, str]]:
    """The answers of the demo's models, before and after each test."""
    before = {model: service.answer(model, QUESTION) for model in ("xinglin-demo", "doctor", "leaflet")}
    yield before
    assert {model: service.answer(model, QUESTION) for model in before} == before


def content(service: Service, store: AdapterStore, number: int) -> Path:
    """A folder with a revision of its own that answers like the demo's doctor."""
    folder = demo_folder(service.data_dir / "incoming" / f"content-{number}", store)
    folder.path.parent.mkdir(exist_ok=True)
    folder.config["lora_dropout"] = number / 1000
    folder.golden = folder.golden[:2]
    return folder.write()


@contextmanager
def asking(service: Service, *models: str) -> Iterator[Counter[tuple[str, int]]]:
    """Send these models one request after another meanwhile; the statuses are complete afterwards."""
    found = Counter[tuple[str, int]]()
    done = threading.Event()

    def ask(model: str) -> None:
        while not done.is_set():
            status, _ = asked(service, model, max_tokens=8)
            found[model, status] += 1

    with ThreadPoolExecutor(len(models)) as pool:
        running = [pool.submit(ask, model) for model in models]
        try:
            yield found
        finally:
            done.set()
        for one in running:
            one.result()


def chats(store: AdapterStore) -> dict[tuple[str, str], str]:
    """The aliases, but for reward adapters, which are never served."""
    return {key: revision for key, revision in store.pointed().items() if key[0] != "doctor-rm"}


def assert_of_one_mind(service: Service, store: AdapterStore, answer: str) -> None:
    """Check that the store is intact, that the service shows and serves its state, and holds nothing else."""

    def disagreements() -> list[Any]:
        shown = service.adapters()
        engine = shown.pop("engine")
        pointed = {f"{name}@{alias}": revision for (name, alias), revision in chats(store).items()}
        found = {ref: entry["actual"] for ref, entry in shown.items() if entry["status"] == "ready"}
        held = set(engine["held"])
        needed = {f"{ref.partition('@')[0]}@{revision}" for ref, revision in pointed.items()}
        may_stay = {f"{entry['name']}@{entry['rollback_to']}" for entry in shown.values()}
        different = [] if pointed == found else [pointed, found]
        return [*different, *(needed - held), *(held - needed - may_stay)]

    deadline = time.monotonic() + 60
    while found := disagreements():
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    for name in store.names():
        assert store.log(name)
        for manifest in store.revisions(name):
            store.verify(manifest)
    for (name, alias), revision in chats(store).items():
        status, reply = asked(service, f"{name}@{alias}")
        assert (status, reply["system_fingerprint"]) == (200, f"{name}@{revision}")
        if name not in ("doctor", "doctor-ppo", "leaflet"):
            assert service.answer(f"{name}@{alias}", QUESTION) == answer


def test_fifty_concurrent_publishers_of_one_name(
    service: Service, store: AdapterStore, folders: list[Path], answers: dict[str, str]
) -> None:
    def publish_one(number: int) -> int:
        alias = (None, "default", "default", "default", f"alias-{number % 3}")[number // CONTENTS % 5]
        status, reply = publish(service, folders[number % CONTENTS], "raced", alias=alias)
        assert status == 200, reply
        return status

    with (
        asking(service, "raced", "raced", "raced@alias-1", "leaflet", "xinglin-demo") as found,
        ThreadPoolExecutor(PUBLISHERS) as pool,
    ):
        assert list(pool.map(publish_one, range(PUBLISHERS))) == [200] * PUBLISHERS
    assert {status for model, status in found if model.startswith("raced")} <= {200, 404, 503}
    assert {status for model, status in found if not model.startswith("raced")} == {200}
    assert len(store.revisions("raced")) == CONTENTS
    assert len([entry for entry in store.log("raced") if entry.action == "publish"]) == CONTENTS
    assert not [*(store.root / ".staging").glob("[!.]*")]
    assert_of_one_mind(service, store, answers["doctor"])
    assert engine_starts(service) == 1


def test_concurrent_operators(
    service: Service, store: AdapterStore, folders: list[Path], answers: dict[str, str]
) -> None:
    revisions = [publish(service, folder, "moved", alias="default")[1]["revision"] for folder in folders]
    until = time.monotonic() + SECONDS

    def over_http(seed: int) -> Counter[str]:
        chance, found, base = random.Random(seed), Counter[str](), "/v1/adapters/moved"
        moves: list[Callable[[], tuple[str, str, Any]]] = [
            lambda: ("PUT", f"{base}/aliases/default", {"revision": chance.choice(revisions)}),
            lambda: ("PUT", f"{base}/aliases/other", {"revision": chance.choice(revisions)}),
            lambda: ("DELETE", f"{base}/aliases/{chance.choice(['default', 'other', 'canary'])}", None),
            lambda: ("POST", f"{base}/rollback", {}),
            lambda: ("POST", f"{base}/rollback", {"alias": "other", "revision": chance.choice(revisions)}),
            lambda: ("PUT", f"{base}/canary", {"percent": 50, "revision": chance.choice(revisions)}),
            lambda: ("PUT", f"{base}/shadow", {"percent": 50, "revision": chance.choice(revisions)}),
            lambda: ("POST", f"{base}/canary/promote", {}),
            lambda: ("DELETE", f"{base}/{chance.choice(['canary', 'shadow'])}", None),
        ]
        while time.monotonic() < until:
            method, path, body = chance.choice(moves)()
            status, reply = service.call(method, path, body)
            found[f"{status} {reply['error']['code']}" if status != 200 else "200"] += 1
        return found

    def elsewhere(seed: int) -> Counter[str]:
        chance, found = random.Random(seed), Counter[str]()
        moves: list[Callable[[], Any]] = [
            lambda: store.set_alias("moved", "default", chance.choice(revisions), actor="test"),
            lambda: store.rollback("moved", actor="test"),
            lambda: store.promote("moved", actor="test"),
            lambda: store.remove_alias("moved", "other", actor="test"),
            lambda: store.prune("moved", keep=CONTENTS, actor="test"),
        ]
        while time.monotonic() < until:
            with suppress(AdapterError):
                chance.choice(moves)()
            time.sleep(0.05)
        return found

    models = ("moved", "moved", "moved@other", "moved@canary", "leaflet", "xinglin-demo")
    with asking(service, *models) as asked_for, ThreadPoolExecutor(OPERATORS) as pool:
        operators = [over_http] * (OPERATORS - 1) + [elsewhere]
        running = [pool.submit(operate, seed) for seed, operate in enumerate(operators)]
        operated = sum((one.result() for one in running), Counter[str]())
    assert operated["200"] > OPERATORS, operated
    assert not [told for told in operated if told.startswith("5") and not told.startswith("503")], operated
    assert {status for model, status in asked_for if model.startswith("moved")} <= {200, 404, 503}
    assert {status for model, status in asked_for if not model.startswith("moved")} == {200}
    for alias in ("canary", "shadow"):  # they may or may not be left
        service.call("DELETE", f"/v1/adapters/moved/{alias}")
    assert_of_one_mind(service, store, answers["doctor"])
    assert engine_starts(service) == 1


def test_publishers_killed_while_the_service_follows(
    service: Service, store: AdapterStore, answers: dict[str, str]
) -> None:
    def start(number: int) -> subprocess.Popen[bytes]:
        folder = content(service, store, 100 + number)
        command = [
            sys.executable,
            "-m",
            "adapters",
            "--store",
            str(store.root),
            "publish",
            str(folder),
            "--name",
            "torn",
        ]
        return subprocess.Popen(
            [*command, "--alias", "default"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    chance = random.Random(0)
    whole = start(0)
    started = time.monotonic()
    assert whole.wait(60) == 0
    seconds = time.monotonic() - started
    ended = Counter[int]()
    with asking(service, "torn", "leaflet") as found:
        for number in range(1, KILLED_PUBLISHERS + 1):
            process = start(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds * chance.uniform(0.5, 1.1))
            process.kill()
            ended[process.wait()] += 1
    assert ended[-signal.SIGKILL], ended
    assert {status for model, status in found if model == "torn"} <= {200, 404, 503}
    assert {status for model, status in found if model == "leaflet"} == {200}
    assert start(KILLED_PUBLISHERS + 1).wait(60) == 0, "the next publisher cannot go on"
    assert not [*(store.root / ".staging").glob("[!.]*")]
    assert_of_one_mind(service, store, answers["doctor"])
    assert engine_starts(service) == 1


def wait_for_the_end(pids: list[int]) -> None:
    Service.wait_for(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], 30)


@pytest.mark.timeout(120 + 90 * KILLS)
@pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning"
)  # http.client leaves an interrupted socket open
def test_the_service_killed_while_it_publishes_and_moves(
    service: Service, store: AdapterStore, folders: list[Path], answers: dict[str, str]
) -> None:
    chance = random.Random(0)
    for round_ in range(KILLS):
        done = threading.Event()

        def operate(seed: int, done: threading.Event = done) -> None:
            choose = random.Random(seed)
            while not done.is_set():
                with suppress(OSError, http.client.HTTPException):
                    publish(
                        service, choose.choice(folders), "killed", alias=choose.choice(["default", "other"])
                    )
                    service.call("POST", "/v1/adapters/killed/rollback", {})
                    service.call("PUT", "/v1/adapters/killed/canary", {"percent": choose.randrange(100)})
                    service.call("POST", "/v1/adapters/killed/canary/promote", {})

        engines = service.engine_pids()
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(operate, 10 * round_ + seed) for seed in range(3)]
            time.sleep(chance.uniform(0.1, 2))
            service.process.kill()
            service.process.wait(10)
            done.set()
            for one in running:
                one.result()
        wait_for_the_end(engines)
        service.start()
        assert_of_one_mind(service, store, answers["doctor"])
        assert publish(service, folders[round_ % CONTENTS], "killed")[0] == 200
        assert not [*(store.root / ".staging").glob("[!.]*")], "what the killed one left is not swept"
    gc.collect()
