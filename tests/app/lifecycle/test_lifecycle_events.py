"""More adapters than fit, and everything that can happen to them while they answer or are evicted."""

import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterRef, AdapterStore
from tests.adapters.changes import every
from tests.app.spoilt import Unharmed, asked, begun, demo_folder, publish, publish_one
from tests.conftest import copy_products
from tests.service import Service, free_port

RESIDENT, SLOTS = 3, 2
MANY = [f"many-{number}" for number in range(5)]


@pytest.fixture(scope="module")
def service(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for this module alone, with room for few adapters."""
    data_dir = copy_products(demo_dir, tmp_path_factory.mktemp("life") / "data")
    store = AdapterStore(data_dir / "store")
    (data_dir / "incoming").mkdir()
    folder = demo_folder(data_dir / "incoming" / "many", store).write()
    for name in MANY:
        revision = store.publish(folder, name, actor="test").revision
        store.set_alias(name, "default", revision, actor="test")
    limits = {"XINGLIN_MAX_RESIDENT": str(RESIDENT), "XINGLIN_MAX_LORAS": str(SLOTS)}
    service = Service(data_dir, free_port(), limits)
    service.start()
    yield service
    assert service.stop() == 0, service.log[-4000:]


@pytest.fixture(scope="module")
def store(service: Service) -> AdapterStore:
    return AdapterStore(service.data_dir / "store")


@pytest.fixture(autouse=True)
def _nothing_else_happens(service: Service, unharmed: Unharmed) -> Iterator[None]:
    """Check after every test that the same engine gives the same answers and keeps to its limits."""
    yield
    assert Unharmed.of(service, "xinglin-demo", "doctor", "leaflet") == unharmed
    engine = service.adapters()["engine"]
    assert len(engine["held"]) <= RESIDENT
    assert not [ref for ref in engine["held"] if ref.startswith("id:")]
    assert not engine["waiting"]


@pytest.fixture(scope="module")
def unharmed(service: Service) -> Unharmed:
    found = Unharmed.of(service, "xinglin-demo", "doctor", "leaflet")
    assert found.engine_starts == 1
    return found


@pytest.fixture
def name(request: pytest.FixtureRequest, service: Service, store: AdapterStore) -> Iterator[str]:
    """A unique adapter name for one test; its aliases are removed afterwards."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower())[-50:].strip(
        "-"
    )
    yield name
    for alias in store.aliases(name):
        store.remove_alias(name, alias, actor="test")
    service.wait_for(lambda: not [key for key in service.adapters() if key.startswith(f"{name}@")])


def a_folder(service: Service, store: AdapterStore, name: str, without_golden: int = 0) -> Path:
    path = service.data_dir / "incoming" / f"{name}-{without_golden}"
    return demo_folder(path, store, without_golden=without_golden).write()


def evict(service: Service, ref: str) -> None:
    """Request others until the engine has evicted `ref`."""
    for other in MANY * 2:
        if ref not in service.adapters()["engine"]["held"]:
            return
        assert asked(service, other)[0] == 200
    raise AssertionError(f"{ref} is never evicted")


def status_of(service: Service, name: str, alias: str = "default") -> dict[str, Any]:
    found: dict[str, Any] = service.adapters()[f"{name}@{alias}"]
    return found


def answering_revision(service: Service, model: str) -> str:
    _, reply = asked(service, model)
    return str(reply["system_fingerprint"]).partition("@")[2]


def test_more_adapters_than_fit_are_loaded_on_demand(service: Service, unharmed: Unharmed) -> None:
    shown = service.adapters()
    assert {shown[f"{name}@default"]["status"] for name in MANY} == {"ready"}
    answers = [service.answer(name, "感冒有什么症状？") for name in MANY * 2]
    assert set(answers) == {unharmed.answers["doctor"]}
    shown = service.adapters()
    assert len(shown["engine"]["held"]) == RESIDENT
    assert sum(shown[f"{name}@default"]["resident"] for name in MANY) == RESIDENT


def test_concurrent_first_requests(service: Service, unharmed: Unharmed) -> None:
    """Thirty requests for five adapters of which three fit and two may run: all get their turn."""
    with ThreadPoolExecutor(30) as pool:
        replies = [pool.submit(service.answer, name, "感冒有什么症状？") for name in MANY * 6]
    assert Counter(reply.result() for reply in replies) == {unharmed.answers["doctor"]: 30}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def replace_by_nan(folder: Path, store: AdapterStore) -> None:
    made = demo_folder(folder.parent / "nan", store)
    every(lambda array: array * float("nan"))(made)
    weights = (made.write() / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    shutil.rmtree(made.path)


def empty(folder: Path, _: AdapterStore) -> None:
    for path in folder.iterdir():
        path.unlink()


Damage = Callable[[Path, AdapterStore], Any]


def to(file: str, damage: Callable[[Path], Any]) -> Damage:
    return lambda folder, _: damage(folder / file)


DAMAGES: dict[str, Damage] = {
    "deleted": lambda folder, _: shutil.rmtree(folder),
    "emptied": empty,
    "nan": replace_by_nan,
    **{f"cut {file}": to(file, cut) for file in ("adapter_model.safetensors", "manifest.json")},
    **{f"changed {file}": to(file, change_a_byte) for file in ("adapter_model.safetensors", "golden.jsonl")},
    **{f"missing {file}": to(file, Path.unlink) for file in ("adapter_config.json", "manifest.json")},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_while_evicted(service: Service, store: AdapterStore, name: str, damage: Damage) -> None:
    revision = publish_one(service, a_folder(service, store, name), name)
    evict(service, f"{name}@{revision}")
    damage(store.folder(name, revision), store)
    innocent = begun(service, "leaflet", tokens=150)
    status, reply = asked(service, name)
    assert (status, reply["error"]["code"]) == (503, "adapter_unavailable"), reply
    assert str(service.data_dir) not in reply["error"]["message"]
    service.wait_for(lambda: status_of(service, name)["status"] == "failed")
    shown = status_of(service, name)
    assert shown["actual"] is None
    assert shown["last_error"]
    assert str(service.data_dir) not in shown["last_error"]
    assert asked(service, name)[0] == 503, "it is known, and not ready"
    assert "".join(innocent)


@pytest.mark.parametrize("how", ["deleted", "nan"])
def test_damaged_while_evicted_the_previous_revision_answers(
    service: Service, store: AdapterStore, name: str, how: str
) -> None:
    before = publish_one(service, a_folder(service, store, name), name)
    after = publish_one(service, a_folder(service, store, name, 1), name)
    evict(service, f"{name}@{after}")
    DAMAGES[how](store.folder(name, after), store)
    assert asked(service, name)[0] == 503
    service.wait_for(lambda: status_of(service, name)["actual"] == before)
    shown = status_of(service, name)
    assert (shown["desired"], shown["status"]) == (after, "failed")
    assert after in shown["last_error"]
    assert answering_revision(service, name) == before


@pytest.mark.parametrize("how", ["deleted", "missing manifest.json"])
def test_publishing_again_repairs_a_damaged_revision(
    service: Service, store: AdapterStore, name: str, how: str, unharmed: Unharmed
) -> None:
    folder = a_folder(service, store, name)
    revision = publish_one(service, folder, name)
    evict(service, f"{name}@{revision}")
    DAMAGES[how](store.folder(name, revision), store)
    asked(service, name)
    assert publish_one(service, folder, name) == revision
    assert status_of(service, name) | {"resident": True} == {
        "name": name, "alias": "default", "desired": revision, "actual": revision, "status": "ready",
        "proven": True, "resident": True, "percent": None, "rollback_to": None,
        "last_error": None,
    }  # fmt: skip
    assert service.answer(name, "感冒有什么症状？") == unharmed.answers["doctor"]


def test_deleted_while_it_answers(service: Service, store: AdapterStore, name: str) -> None:
    revision = publish_one(service, a_folder(service, store, name), name)
    expected = "".join(begun(service, name))
    running = begun(service, name)
    shutil.rmtree(store.folder(name, revision))
    assert "".join(running) == expected
    assert asked(service, name)[0] in (200, 503)


def test_alias_removed_while_it_answers(service: Service, store: AdapterStore, name: str) -> None:
    revision = publish_one(service, a_folder(service, store, name), name)
    expected = "".join(begun(service, name))
    running = begun(service, name)
    assert service.call("DELETE", f"/v1/adapters/{name}/aliases/default")[0] == 200
    assert asked(service, name)[0] == 404
    assert f"{name}@{revision}" in service.adapters()["engine"]["held"]
    assert "".join(running) == expected
    service.wait_for(lambda: f"{name}@{revision}" not in service.adapters()["engine"]["held"])


def test_alias_moved_while_it_answers(service: Service, store: AdapterStore, name: str) -> None:
    before = publish_one(service, a_folder(service, store, name), name)
    expected = "".join(begun(service, name))
    running = begun(service, name)
    after = publish_one(service, a_folder(service, store, name, 1), name)
    assert answering_revision(service, name) == after
    engine = service.adapters()["engine"]
    assert {f"{name}@{before}", f"{name}@{after}"} <= set(engine["held"])
    assert engine["leases"][f"{name}@{before}"] == 1
    assert "".join(running) == expected

    # The previous revision stays for a rollback until another one takes its place.
    service.wait_for(lambda: service.adapters()["engine"]["leases"][f"{name}@{before}"] == 0)
    assert status_of(service, name)["rollback_to"] == before
    assert publish_one(service, a_folder(service, store, name, 2), name) != after
    service.wait_for(lambda: f"{name}@{before}" not in service.adapters()["engine"]["held"])
    assert f"{name}@{after}" in service.adapters()["engine"]["held"]


def test_one_revision_under_two_names(
    service: Service, store: AdapterStore, name: str, unharmed: Unharmed
) -> None:
    folder, twin = a_folder(service, store, name), f"{name}-twin"
    revision = publish_one(service, folder, name)
    assert publish_one(service, folder, twin) == revision
    for one in (name, twin):
        assert service.answer(one, "感冒有什么症状？") == unharmed.answers["doctor"]
    assert service.call("DELETE", f"/v1/adapters/{name}/aliases/default")[0] == 200
    assert asked(service, name)[0] == 404
    assert service.answer(twin, "感冒有什么症状？") == unharmed.answers["doctor"]
    assert service.call("DELETE", f"/v1/adapters/{twin}/aliases/default")[0] == 200


def test_one_revision_under_two_aliases(service: Service, store: AdapterStore, name: str) -> None:
    folder = a_folder(service, store, name)
    revision = publish_one(service, folder, name)
    assert publish_one(service, folder, name, alias="second") == revision
    assert service.call("DELETE", f"/v1/adapters/{name}/aliases/default")[0] == 200
    assert answering_revision(service, f"{name}@second") == revision
    assert f"{name}@{revision}" in service.adapters()["engine"]["held"]


def test_a_failed_publication_under_a_name_that_answers(
    service: Service, store: AdapterStore, name: str
) -> None:
    before = publish_one(service, a_folder(service, store, name), name)
    running = begun(service, name, tokens=300)
    spoilt = demo_folder(service.data_dir / "incoming" / "failed", store)
    spoilt.config["lora_alpha"] = 77
    status, reply = publish(service, spoilt.write(), name)
    assert (status, reply["error"]["code"]) == (400, "proof_failed"), reply
    assert status_of(service, name) | {"last_error": None} == {
        "name": name, "alias": "default", "desired": before, "actual": before, "status": "ready",
        "proven": True, "resident": True, "percent": None, "rollback_to": None,
        "last_error": None,
    }  # fmt: skip
    assert "".join(running)
    assert answering_revision(service, name) == before
    held = [ref for ref in service.adapters()["engine"]["held"] if ref.startswith(f"{name}@")]
    assert held == [f"{name}@{before}"]


def test_prune_keeps_revisions_that_answer(service: Service, store: AdapterStore, name: str) -> None:
    folders = [a_folder(service, store, name, number) for number in range(3)]
    first = publish_one(service, folders[0], name)
    second, third = (publish_one(service, folder, name, alias=None) for folder in folders[1:])
    running = begun(
        service, name, 900, n=8, temperature=1
    )  # many and long, so that they still run during the prune
    for revision in (second, third):
        path = f"/v1/adapters/{name}/aliases/default"
        assert service.call("PUT", path, {"revision": revision})[0] == 200
    status, reply = service.call("POST", f"/v1/adapters/{name}/prune", {"keep": 0})
    assert (status, reply["removed"]) == (200, []), reply
    assert "".join(running)
    service.wait_for(lambda: f"{name}@{first}" not in service.adapters()["engine"]["held"])
    _, reply = service.call("POST", f"/v1/adapters/{name}/prune", {"keep": 0})
    assert reply["removed"] == [first]
    assert {manifest.revision for manifest in store.revisions(name)} == {second, third}
    assert answering_revision(service, name) == third
    assert service.call("POST", f"/v1/adapters/{name}/rollback", {"revision": first})[0] == 404


def test_vllms_load_and_unload_race_with_requests(service: Service, store: AdapterStore, name: str) -> None:
    folder = a_folder(service, store, name)
    done = threading.Event()

    def operate(seed: int) -> Counter[int]:
        chance, found = random.Random(seed), Counter[int]()
        for _ in range(20):
            if chance.random() < 0.5:
                load = {"lora_name": name, "lora_path": str(folder), "load_inplace": chance.random() < 0.5}
                found[service.call("POST", "/v1/load_lora_adapter", load)[0]] += 1
            else:
                found[service.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})[0]] += 1
        return found

    def ask(model: str) -> Counter[int]:
        found = Counter[int]()
        while not done.is_set():
            found[asked(service, model)[0]] += 1
        return found

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask, model) for model in (name, name, "leaflet", "xinglin-demo")]
        operating = [pool.submit(operate, seed) for seed in range(3)]
        try:
            operated = sum((one.result() for one in operating), Counter[int]())
        finally:
            done.set()
    assert set(operated) <= {200, 400, 404}
    assert operated[200]
    for one in asking[:2]:
        assert set(one.result()) <= {200, 404, 503}
    for one in asking[2:]:
        assert set(one.result()) == {200}
    desired = store.aliases(name).get("default")
    service.wait_for(lambda: service.adapters().get(f"{name}@default", {}).get("actual") == desired)
    if desired:
        assert store.get(AdapterRef(name, revision=desired))
        assert answering_revision(service, name) == desired
