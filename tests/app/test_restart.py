"""State survives a restart, a killed engine and a killed service."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from adapters import AdapterStore, read_golden, write_golden
from tests.service import Service, free_port
from tests.trainer import Trainer

QUESTION = "What are the symptoms of gout?"


def _state(service: Service) -> dict[str, object]:
    shown = service.adapters()
    shown["engine"] = shown["engine"]["held"]
    answers = {model.id: service.answer(model.id, QUESTION) for model in service.client().models.list()}
    return {"adapters": shown, "answers": answers}


@pytest.mark.timeout(400)
def test_restart_engine_death_and_kill(data_dir: Path, trainer: Trainer) -> None:
    store = AdapterStore(data_dir / "store")
    canary = store.publish(trainer.variant(data_dir / "canary", seed=7), "doctor", actor="test")
    store.set_alias("doctor", "canary", canary.revision, actor="test")
    service = Service(data_dir, free_port(), is_forked=False)
    try:
        _go_through(service, store, trainer, canary.revision)
    finally:
        if service.process.poll() is None:
            service.stop()


def _go_through(service: Service, store: AdapterStore, trainer: Trainer, canary: str) -> None:
    service.start()

    # An alias moves in the store to a revision that fails its proof: the previous one keeps answering.
    spoilt = trainer.variant(service.data_dir / "spoilt", seed=9)
    golden = read_golden(spoilt / "golden.jsonl")
    write_golden(
        spoilt / "golden.jsonl", [p.model_copy(update={"logprobs": p.base_logprobs}) for p in golden]
    )
    bad = store.publish(spoilt, "doctor", actor="test").revision
    store.set_alias("doctor", "canary", bad, actor="test")
    service.wait_for(lambda: service.adapters()["doctor@canary"]["last_error"] is not None)
    before = _state(service)
    shown = service.adapters()["doctor@canary"]
    assert (shown["desired"], shown["actual"], shown["status"]) == (bad, canary, "failed")

    # A restart brings back the same adapters, aliases and statuses, and the same answers.
    engines = service.engine_pids()
    assert service.stop() == 0
    assert not _alive(engines)
    service.start()
    assert _state(service) == before

    # An engine is killed during a stream and a publication: the stream ends in an error, and another engine
    # starts with the same revisions.
    (engine,) = service.engine_pids()
    (fork_server,) = service.started("forkserver")
    stream = service.client().chat.completions.create(
        model="leaflet", messages=[{"role": "user", "content": QUESTION}], stream=True,
        max_tokens=900, extra_body={"min_tokens": 900, "ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    with ThreadPoolExecutor() as pool:
        path = {"revision": bad}  # refused by its proof, if it gets that far
        publication = pool.submit(service.call, "PUT", "/v1/adapters/doctor/aliases/canary", path)
        time.sleep(0.1)
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
        assert caught.value.code == "engine_unavailable"
        assert publication.result(timeout=30)[0] in (400, 503)
    service.wait_for(lambda: service.call("GET", "/readyz")[0] == 503)
    status, reply = service.call("POST", "/v1/chat/completions", {"model": "doctor", "messages": []})
    assert (status, reply["error"]["code"]) == (503, "engine_unavailable")
    service.wait_until_ready()
    assert service.started("forkserver") == [fork_server]  # it did not import vLLM again
    assert service.engine_pids() != [engine]
    assert _state(service) == before
    assert "xinglin_engine_starts_total 2.0" in str(service.call("GET", "/metrics")[1])

    # A killed service leaves no engine and no fork server behind.
    started = service.started()
    assert {*service.engine_pids(), fork_server} < {*started}
    service.process.kill()
    service.process.wait()
    deadline = time.monotonic() + 60
    while _alive(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(started)


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]
