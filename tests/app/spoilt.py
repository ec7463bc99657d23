"""The demo's adapters as folders to change and publish, and the state of an unharmed service."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors.numpy import load_file

from adapters import AdapterRef, AdapterStore, Provenance, read_golden
from tests.adapters.folders import Folder
from tests.service import Service

QUESTION = "感冒有什么症状？"


def demo_folder(path: Path, store: AdapterStore, name: str = "doctor", *, without_golden: int = 0) -> Folder:
    """Return a folder of the revision that `name` points at; fewer golden prompts make it another revision.

    It does not say which weights training wrote, so that changed ones come as far as the proof.
    """
    manifest = store.get(AdapterRef.parse(name))
    source = store.folder(name, manifest.revision)
    facts = {key: getattr(manifest, key) for key in Provenance.model_fields if key != "weights_digest"}
    return Folder(
        path=path,
        config=json.loads((source / "adapter_config.json").read_text()),
        tensors=load_file(source / "adapter_model.safetensors"),
        provenance=json.loads(Provenance(**facts).model_dump_json()),
        golden=read_golden(source / "golden.jsonl")[without_golden:],
    )


def publish(service: Service, folder: Path, name: str = "doctor", **options: Any) -> tuple[int, Any]:
    """POST /v1/adapters with a folder."""
    return service.call("POST", "/v1/adapters", {"name": name, "path": str(folder), **options})


def publish_one(service: Service, folder: Path, name: str = "doctor", **options: Any) -> str:
    """Publish an adapter that must be accepted, and return its revision."""
    status, reply = publish(service, folder, name, **options)
    assert status == 200, reply
    return str(reply["revision"])


def engine_starts(service: Service) -> float:
    """Return the number of engine starts in /metrics."""
    _, text = service.call("GET", "/metrics")
    [line] = [line for line in text.splitlines() if line.startswith("xinglin_engine_starts_total ")]
    return float(line.split()[1])


def listing(data_dir: Path, *but: str) -> set[tuple[str, int]]:
    """Return every file below a data directory with its size, except below `but`."""
    found = set()
    for path in data_dir.rglob("*"):
        name = str(path.relative_to(data_dir))
        if not name.startswith(but) and name != "service.log":
            found.add((name, path.lstat().st_size if path.is_file() else 0))
    return found


@dataclass(frozen=True)
class Unharmed:
    """The state that no publication may change: the engine, and the answers of the models."""

    engine_pids: list[int]
    engine_starts: float
    answers: dict[str, str]

    @classmethod
    def of(cls, service: Service, *models: str) -> Self:
        return cls(
            service.engine_pids(),
            engine_starts(service),
            {model: service.answer(model, QUESTION) for model in models},
        )


def begun(service: Service, model: str, tokens: int = 900, **options: Any) -> Iterator[str]:
    """Return a started stream of so many tokens; iterate to read it and check that it ends well."""
    events = service.client().chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=tokens,
        stream=True,
        **{"temperature": 0, **options},
        extra_body={"min_tokens": tokens, "ignore_eos": True},
    )
    first = next(events)

    def rest() -> Iterator[str]:
        finish = None
        for event in (first, *events):
            finish = event.choices[0].finish_reason or finish
            yield event.choices[0].delta.content or ""
        assert finish == "length", finish

    return rest()


def asked(service: Service, model: str, **options: Any) -> tuple[int, Any]:
    """Send one chat request and return its status and body."""
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24, **options}
    return service.call("POST", "/v1/chat/completions", body)
