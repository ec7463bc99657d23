"""Two base models of different architectures in one service, and a third that cannot be started."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from shutil import copy
from typing import Any

import openai
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import Provenance, fingerprint
from tests.conftest import copy_products
from tests.service import Service, free_port

QUESTION = "What are the symptoms of gout?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def data_dir(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's models, and a Llama of random weights with the demo's tokenizer."""
    folder = copy_products(demo_dir, tmp_path_factory.mktemp("bases") / "data")
    demo, llama = folder / "models" / "xinglin-demo", folder / "models" / "tiny-llama"
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    model.save_pretrained(llama)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        copy(demo / name, llama / name)
    adapter = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapter.save_pretrained(folder / "incoming" / "nurse")
    provenance = Provenance(stage="sft", base_model="tiny-llama", base_fingerprint=fingerprint(llama))
    (folder / "incoming" / "nurse" / "provenance.json").write_text(provenance.model_dump_json())
    (folder / "bases.yaml").write_text(
        f"- model: {demo}\n"
        f"- model: {llama}\n"
        "  max_loras: 1\n"
        "  max_resident: 2\n"
        f"- model: {folder}/models/nowhere\n"
        "  served_model_name: lost\n"
    )
    return folder


@pytest.fixture(scope="module")
def service(data_dir: Path) -> Iterator[Service]:
    settings = {
        "XINGLIN_BASE_MODELS": str(data_dir / "bases.yaml"),
        "XINGLIN_ALLOW_UNPROVEN": "true",
        "XINGLIN_STALL_SECONDS": "5",
        "XINGLIN_ALWAYS_USAGE": "true",
        "XINGLIN_MAX_LOGPROBS": "30",
        "XINGLIN_RETURN_TOKENS_AS_TOKEN_IDS": "true",
        "XINGLIN_TOKENIZER_INFO": "true",
        "XINGLIN_ROOT_PATH": "/llm",
    }
    service = Service(data_dir, free_port(), settings)
    service.start()
    yield service
    engines = service.engine_pids()
    assert service.stop() == 0
    assert not [pid for pid in engines if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("logprobs", [False, True])
def test_always_usage_ends_every_stream_with_usage(service: Service, logprobs: bool) -> None:
    more = {"logprobs": True, "top_logprobs": 30} if logprobs else {}
    with service.client() as client:
        *chunks, last = client.chat.completions.create(
            model="tiny-llama",
            messages=MESSAGES,
            max_tokens=3,
            stream=True,
            **more,  # type: ignore[call-overload]
        )
    assert last.choices == []
    assert last.usage.completion_tokens == 3
    assert not [chunk for chunk in chunks if chunk.usage]
    if logprobs:
        (token,) = chunks[1].choices[0].logprobs.content
        assert token.token.startswith("token_id:")
        assert len(token.top_logprobs) == 30


def answer(service: Service, model: str) -> str:
    reply = service.client().chat.completions.create(
        model=model,
        messages=MESSAGES,
        temperature=0,
        max_tokens=20,
        extra_body={"ignore_eos": True},  # type: ignore[arg-type]
    )
    assert reply.model == model
    return str(reply.choices[0].message.content)


def test_a_base_model_with_a_wrong_path_stops_no_other(service: Service) -> None:
    status, reply = service.call("GET", "/readyz")
    assert status == 200
    assert {name: one["status"] for name, one in reply["models"].items()} == {
        "xinglin-demo": "ready", "tiny-llama": "ready", "lost": "failed",
    }  # fmt: skip
    assert "nowhere" not in str(reply)
    status, reply = service.call("POST", "/v1/chat/completions", {"model": "lost", "messages": MESSAGES})
    assert (status, reply["error"]["code"]) == (503, "engine_unavailable")
    assert "could not be started" in reply["error"]["message"]


def test_each_base_model_answers_to_its_name_and_is_listed(service: Service) -> None:
    assert answer(service, "xinglin-demo") != answer(service, "tiny-llama")
    assert answer(service, "doctor") != answer(service, "xinglin-demo")
    _, models = service.call("GET", "/v1/models")
    cards = {card["id"]: (card["parent"], card["max_model_len"]) for card in models["data"]}
    assert cards["xinglin-demo"] == (None, 1024)
    assert cards["tiny-llama"] == (None, 512)
    assert cards["doctor"] == ("xinglin-demo", 1024)
    assert cards["lost"] == (None, None)


def test_adapters_load_on_their_own_base_model(service: Service, data_dir: Path) -> None:
    body = {"name": "nurse", "path": str(data_dir / "incoming" / "nurse")}
    status, reply = service.call("POST", "/v1/adapters", body)
    assert status == 200, reply
    engines = {one["base_model"]: one["held"] for one in service.call("GET", "/v1/adapters")[1]["engines"]}
    assert engines["tiny-llama"] == [f"nurse@{reply['revision']}"]
    assert {ref.partition("@")[0] for ref in engines["xinglin-demo"]} == {"doctor", "doctor-ppo", "leaflet"}
    assert engines["lost"] is None
    assert answer(service, "nurse") != answer(service, "tiny-llama")
    _, models = service.call("GET", "/v1/models/nurse")
    assert models["parent"] == "tiny-llama"


def test_a_killed_engine_does_not_affect_the_other(service: Service) -> None:
    names = ("xinglin-demo", "doctor", "tiny-llama", "nurse")
    before = {model: answer(service, model) for model in names}
    demo, llama = _engines(service)
    others = _begun(service, "doctor")
    stream = _begun(service, "tiny-llama", 16)
    os.kill(llama, signal.SIGKILL)
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "engine_unavailable"
    *_, last, usage = others
    assert last.choices[0].finish_reason == "length"
    assert usage.usage.completion_tokens == 400
    status, reply = service.call("GET", "/readyz")
    assert (status, reply["models"]["xinglin-demo"]["status"]) == (200, "ready")
    _comes_back(service, llama)
    assert demo in service.engine_pids()
    assert {model: answer(service, model) for model in names} == before


def test_a_stalled_engine_is_restarted(service: Service) -> None:
    before = {model: answer(service, model) for model in ("doctor", "tiny-llama")}
    demo, llama = _engines(service)
    stream = _begun(service, "tiny-llama", 16)
    os.kill(llama, signal.SIGSTOP)
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "engine_unavailable"
    assert answer(service, "doctor") == before["doctor"]
    _comes_back(service, llama)
    assert demo in _engines(service)
    assert answer(service, "tiny-llama") == before["tiny-llama"]


def _begun(service: Service, model: str, n: int = 1) -> openai.Stream[Any]:
    """Return a started stream of `n` answers of 400 tokens; more answers take longer."""
    stream = service.client().chat.completions.create(
        model=model, messages=MESSAGES, temperature=1, max_tokens=400, n=n, stream=True,  # type: ignore[arg-type]
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    return stream


def _engines(service: Service) -> list[int]:
    """Engines of the demo's base model and of the Llama; the former was built first."""
    return sorted(service.engine_pids(), key=lambda pid: psutil.Process(pid).create_time())


def _comes_back(service: Service, gone: int) -> None:
    """Wait until another engine has replaced the one that is `gone`."""

    def stands() -> str:
        return str(service.call("GET", "/readyz")[1]["models"]["tiny-llama"]["status"])

    service.wait_for(lambda: gone not in service.engine_pids(), 30)
    service.wait_for(lambda: stands() == "ready", 120)


def test_vllm_metrics_are_labeled_by_base_model(service: Service) -> None:
    def tokens() -> dict[str, float]:
        lines = service.call("GET", "/metrics", key=None)[1].splitlines()
        found = (
            re.fullmatch(r'vllm:generation_tokens_total{.*model_name="(.*?)".*} (.*)', line) for line in lines
        )
        return {match[1]: float(match[2]) for match in found if match}

    before = tokens()
    service.answer("tiny-llama", QUESTION, max_tokens=7, extra_body={"ignore_eos": True})
    grown = {name: count - before[name] for name, count in tokens().items()}
    assert grown == {"xinglin-demo": 0, "tiny-llama": 7}


def test_tokenizer_info_shows_no_paths(service: Service) -> None:
    for query in ("", "?model=tiny-llama", "?model=doctor"):
        status, info = service.call("GET", f"/tokenizer_info{query}")
        assert status == 200
        assert info["tokenizer_class"]
        assert "<|im_start|>" in info["chat_template"]
        assert str(service.data_dir) not in json.dumps(info)
    assert service.call("GET", "/tokenizer_info?model=nobody")[0] == 404


def test_answers_below_the_root_path(service: Service) -> None:
    body = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 2}
    for path in ("/v1/chat/completions", "/llm/v1/chat/completions"):
        assert service.call("POST", path, body)[0] == 200
    page = service.call("GET", "/llm/docs", key=None)[1]
    assert "/llm/openapi.json" in page
    assert service.call("GET", "/llm/openapi.json", key=None)[1]["servers"] == [{"url": "/llm"}]


def test_a_request_overrides_the_logprobs_settings(service: Service) -> None:
    body = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 1, "logprobs": True}

    def asked(**more: object) -> tuple[int, str]:
        status, reply = service.call("POST", "/v1/chat/completions", {**body, **more})
        return status, reply["choices"][0]["logprobs"]["content"][0]["token"] if status == 200 else str(reply)

    status, token = asked()
    assert (status, token.partition(":")[0]) == (200, "token_id")
    status, token = asked(return_tokens_as_token_ids=False)
    assert (status, token.partition(":")[0] == "token_id") == (200, False)
    assert asked(top_logprobs=30)[0] == 200
    status, said = asked(top_logprobs=31)
    assert status == 400
    assert "30" in said
