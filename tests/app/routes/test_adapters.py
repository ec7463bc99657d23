"""The life of an adapter over HTTP: publish, point, roll back, and refusals."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapters import AdapterStore, GoldenPrompt, read_golden, write_golden
from tests.service import Service
from tests.trainer import Trainer

QUESTION = "感冒有什么症状？"


@pytest.fixture
def incoming(service: Service, trainer: Trainer, request: pytest.FixtureRequest) -> Path:
    """A folder below the service's publish root with a valid adapter, for a test to damage."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    folder = service.data_dir / "incoming" / name
    copytree(trainer.folder, folder)
    (folder / "manifest.json").unlink()
    (folder / "provenance.json").write_text(trainer.provenance())
    return folder


def publish(service: Service, folder: Path, **options: Any) -> tuple[int, Any]:
    return service.call("POST", "/v1/adapters", {"name": "doctor", "path": str(folder), **options})


def _change(folder: Path, change: Callable[[str, Any], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: change(name, value) for name, value in load_file(path).items()}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def _scaled(folder: Path, trainer: Trainer) -> None:
    _change(folder, lambda name, value: value * 1.1 if "lora_B" in name else value)


def _zeroed(folder: Path, trainer: Trainer) -> None:
    _change(folder, lambda name, value: value * 0 if "lora_B" in name else value)


def _poisoned(folder: Path, trainer: Trainer) -> None:
    _change(
        folder, lambda name, value: np.where(np.arange(value.size).reshape(value.shape) == 3, np.nan, value)
    )


def _huge(folder: Path, trainer: Trainer) -> None:
    _change(folder, lambda name, value: value * np.float32(1e30))


def _of_another_size(folder: Path, trainer: Trainer) -> None:
    _change(folder, lambda name, value: value[:, :100] if name.endswith("q_proj.lora_A.weight") else value)


def _of_another_base(folder: Path, trainer: Trainer) -> None:
    provenance = trainer.provenance(base_fingerprint="0123456789abcdef", base_model="another-base")
    (folder / "provenance.json").write_text(provenance)


def _of_a_base_of_the_same_shape(folder: Path, trainer: Trainer) -> None:
    """Only golden prompts can reveal this: every name, shape and fingerprint agrees."""

    def told_otherwise(prompt: GoldenPrompt) -> GoldenPrompt:
        return prompt.model_copy(update={"base_logprobs": [score - 0.5 for score in prompt.base_logprobs]})

    golden = folder / "golden.jsonl"
    write_golden(golden, [told_otherwise(prompt) for prompt in read_golden(golden)])


def _of_another_template(folder: Path, trainer: Trainer) -> None:
    golden = folder / "golden.jsonl"
    prompts = read_golden(golden)
    write_golden(golden, [p.model_copy(update={"prompt_token_ids": p.prompt_token_ids[1:]}) for p in prompts])


def _beyond_the_vocabulary(folder: Path, trainer: Trainer) -> None:
    golden = folder / "golden.jsonl"
    write_golden(
        golden,
        [p.model_copy(update={"token_ids": [10**6 for _ in p.token_ids]}) for p in read_golden(golden)],
    )


def _too_long_for_the_context(folder: Path, trainer: Trainer) -> None:
    golden = folder / "golden.jsonl"
    (prompt, *_) = read_golden(golden)
    long = {"token_ids": [5] * 2000, "logprobs": [0.0] * 2000, "base_logprobs": [0.0] * 2000}
    write_golden(golden, [prompt.model_copy(update=long)])


def _without_proof(folder: Path, trainer: Trainer) -> None:
    (folder / "golden.jsonl").unlink()


BAD = [
    (_scaled, ["does not answer as it did in training", "nats", "lora_alpha"]),
    (_zeroed, ["all-zero", "change nothing"]),
    (_poisoned, ["NaN"]),
    (_huge, ["trained adapters do not have"]),
    (_of_another_size, ["wrong shapes", "q_proj", "100"]),
    (_of_another_base, ["another-base", "0123456789abcdef", "xinglin-demo"]),
    (_of_a_base_of_the_same_shape, ["base model alone is not the one", "nats", "XINGLIN_DTYPE"]),
    (_of_another_template, ["chat template", "expected", "saw"]),
    (_beyond_the_vocabulary, ["failed its proof"]),
    (_too_long_for_the_context, ["failed its proof"]),
    (_without_proof, ["golden.jsonl", "XINGLIN_ALLOW_UNPROVEN"]),
]


@pytest.mark.parametrize(("spoil", "told"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_a_bad_revision_is_refused_and_the_old_one_keeps_answering(
    service: Service,
    trainer: Trainer,
    incoming: Path,
    spoil: Callable[[Path, Trainer], None],
    told: list[str],
) -> None:
    before, answer = service.adapters(), service.answer("doctor", QUESTION)
    base_answer = service.answer("xinglin-demo", QUESTION)
    spoil(incoming, trainer)
    status, reply = publish(service, incoming)
    assert status == 400, reply
    message = reply["error"]["message"]
    assert not [part for part in told if part not in message], message
    assert str(service.data_dir) not in json.dumps(reply)
    after = service.adapters()
    assert after["doctor@default"]["actual"] == before["doctor@default"]["actual"]
    for held in ("held", "leases", "waiting", "slots_taken"):
        assert after["engine"][held] == before["engine"][held], "something of it is left in the engine"
    assert service.answer("doctor", QUESTION) == answer
    assert service.answer("xinglin-demo", QUESTION) == base_answer
    assert (
        AdapterStore(service.data_dir / "store").aliases("doctor")["default"]
        == before["doctor@default"]["actual"]
    )


def test_publish_point_and_roll_back(service: Service, trainer: Trainer) -> None:
    first = service.adapters()["doctor@default"]["actual"]
    folder = trainer.variant(service.data_dir / "incoming" / "better", seed=1)
    status, reply = publish(service, folder, why="a better one")
    assert (status, reply["name"], reply["alias"]) == (200, "doctor", "default"), reply
    second = reply["revision"]
    assert second != first
    shown = service.adapters()
    assert shown["doctor@default"] | {"last_error": None} == {
        "name": "doctor", "alias": "default", "desired": second, "actual": second,
        "status": "ready", "proven": True, "resident": True, "percent": None, "rollback_to": first,
        "last_error": None,
    }  # fmt: skip
    status, reply = service.call("POST", "/v1/adapters/doctor/rollback")
    assert (status, reply["revision"]) == (200, first), reply
    status, reply = service.call("PUT", "/v1/adapters/doctor/aliases/default", {"revision": second})
    assert (status, reply["revision"]) == (200, second), reply
    status, reply = service.call("PUT", "/v1/adapters/doctor/aliases/default", {"revision": first})
    assert (status, reply["revision"]) == (200, first), reply
    assert AdapterStore(service.data_dir / "store").log("doctor")[-1].actor == "http"


def test_concurrent_rollbacks_leave_store_and_service_consistent(service: Service, trainer: Trainer) -> None:
    first = service.adapters()["doctor@default"]["actual"]
    for seed in (11, 12):
        folder = trainer.variant(service.data_dir / "incoming" / f"two-{seed}", seed=seed)
        assert publish(service, folder)[0] == 200
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(service.call, "POST", "/v1/adapters/doctor/rollback") for _ in range(2)]
    assert {call.result()[0] for call in calls} == {200}
    shown = service.adapters()["doctor@default"]
    store = AdapterStore(service.data_dir / "store")
    assert shown["actual"] == shown["desired"] == store.aliases("doctor")["default"] == first


def test_aliases_moved_elsewhere_are_followed(service: Service, trainer: Trainer) -> None:
    store = AdapterStore(service.data_dir / "store")
    manifest = store.publish(
        trainer.variant(service.data_dir / "incoming" / "followed", seed=2), "doctor", actor="test"
    )
    store.set_alias("doctor", "canary", manifest.revision, actor="test")
    service.wait_for(lambda: service.adapters().get("doctor@canary", {}).get("status") == "ready")
    assert service.answer("doctor@canary", QUESTION)
    store.remove_alias("doctor", "canary", actor="test")
    held = f"doctor@{manifest.revision}"
    service.wait_for(lambda: held not in service.adapters()["engine"]["held"])
    assert "doctor@canary" not in service.adapters()


def test_vllms_own_endpoints(service: Service, trainer: Trainer) -> None:
    folder = trainer.variant(service.data_dir / "incoming" / "theirs", seed=3)
    load = {"lora_name": "theirs", "lora_path": str(folder)}
    assert service.call("POST", "/v1/load_lora_adapter", load) == (
        200, "Success: LoRA adapter 'theirs' added successfully.",
    )  # fmt: skip
    assert service.answer("theirs", QUESTION)
    status, reply = service.call("POST", "/v1/load_lora_adapter", load)
    assert status == 400
    assert "already been loaded" in reply["error"]["message"]
    assert service.call("POST", "/v1/load_lora_adapter", {**load, "load_inplace": True})[0] == 200
    status, reply = service.call("POST", "/v1/adapters/theirs/rollback")
    assert (status, reply["error"]["code"]) == (400, "nothing_to_roll_back")
    unload = {"lora_name": "theirs"}
    assert service.call("POST", "/v1/unload_lora_adapter", unload) == (
        200, "Success: LoRA adapter 'theirs' removed successfully.",
    )  # fmt: skip
    service.wait_for(
        lambda: not [ref for ref in service.adapters()["engine"]["held"] if ref.startswith("theirs@")]
    )
    assert service.call("POST", "/v1/unload_lora_adapter", unload)[0] == 404


@pytest.mark.parametrize("name", ["SQL_LoRA", "org/My_Adapter.v1"])
def test_common_adapter_names_are_accepted(service: Service, trainer: Trainer, name: str) -> None:
    folder = trainer.variant(service.data_dir / "incoming" / "named", seed=4)
    assert (
        service.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})[0] == 200
    )
    assert service.answer(name, QUESTION)
    assert name in [model.id for model in service.client().models.list()]
    assert service.client().models.retrieve(name).id == name
    status, shown = service.call("GET", f"/v1/adapters/{name}")
    assert (status, shown["name"], len(shown["revisions"])) == (200, name, 1)
    first = shown["aliases"]["default"]
    changed = trainer.variant(service.data_dir / "incoming" / "named-2", seed=5)
    status, second = publish(service, changed, name=name)
    assert (status, second["name"]) == (200, name)
    asked = {"revision": second["revision"]}
    status, found = service.call("GET", f"/v1/adapters/{name}/diff?old={first}&new={asked['revision']}")
    assert (status, found.get("name")) == (200, name), found
    assert service.call("PUT", f"/v1/adapters/{name}/canary", {**asked, "percent": 50})[0] == 200
    assert service.call("POST", f"/v1/adapters/{name}/canary/promote")[0] == 200
    assert service.call("POST", f"/v1/adapters/{name}/rollback") == (
        200, {"name": name, "revision": first, "alias": "default"},
    )  # fmt: skip
    assert service.call("PUT", f"/v1/adapters/{name}/aliases/next", asked)[0] == 200
    assert service.answer(f"{name}@next", QUESTION)
    assert service.call("DELETE", f"/v1/adapters/{name}/aliases/next")[0] == 200
    assert service.call("POST", f"/v1/adapters/{name}/prune", {"keep": 2})[0] == 200
    assert service.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
    service.wait_for(lambda: not [ref for ref in service.adapters()["engine"]["held"] if name in ref])


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/adapters", {"name": "doctor", "path": "x"}),
        ("PUT", "/v1/adapters/doctor/aliases/default", {"revision": "0" * 12}),
        ("POST", "/v1/adapters/doctor/rollback", {}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "x"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "doctor"}),
    ],
)
@pytest.mark.parametrize("key", [None, "wrong", ""])
def test_changes_need_the_admin_key(
    service: Service, method: str, path: str, body: Any, key: str | None
) -> None:
    status, reply = service.call(method, path, body, key)
    assert (status, reply["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/etc", "/", "../..", "models/../../..", "nowhere", "a\0b", ""])
def test_only_folders_below_a_root_are_read(service: Service, path: str) -> None:
    status, reply = publish(service, Path(path) if "\0" not in path else path)  # type: ignore[arg-type]
    assert status in (400, 403, 404), reply
    assert str(service.data_dir) not in json.dumps(reply)


def test_a_link_out_of_the_root_is_not_followed(service: Service, tmp_path: Path, trainer: Trainer) -> None:
    outside = copytree(trainer.folder, tmp_path / "outside")
    link = service.data_dir / "incoming" / "link"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    assert publish(service, link)[0] == 403


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("PUT", "/v1/adapters/doctor/aliases/default", {"revision": "0" * 12}, 404, "adapter_not_found"),
        ("PUT", "/v1/adapters/nobody/aliases/default", {"revision": "0" * 12}, 404, "adapter_not_found"),
        ("PUT", "/v1/adapters/doctor/aliases/default", {"revision": "new"}, 400, "invalid_ref"),
        ("PUT", "/v1/adapters/doctor/aliases/UP", {"revision": "0" * 12}, 404, "adapter_not_found"),
        ("PUT", "/v1/adapters/doctor/aliases/default", {}, 400, "missing_required_parameter"),
        ("PUT", "/v1/adapters/doctor/aliases/default", {"revision": "0" * 12, "x": 1}, 400, "invalid_value"),
        ("POST", "/v1/adapters/leaflet/rollback", {"alias": "nowhere"}, 404, "adapter_not_found"),
        ("POST", "/v1/adapters/nobody/rollback", None, 404, "adapter_not_found"),
        ("POST", "/v1/adapters", b"{", 400, "invalid_json"),
    ],
)
def test_wrong_requests(service: Service, method: str, path: str, body: Any, status: int, code: str) -> None:
    found, reply = service.call(method, path, body)
    assert (found, reply["error"]["code"]) == (status, code), reply


def test_an_adapter_cannot_take_the_base_models_name(service: Service, incoming: Path) -> None:
    status, reply = publish(service, incoming, name="xinglin-demo")
    assert status == 400
    assert "base model" in reply["error"]["message"]
