"""Adapters with their own chat template: rendered as in training, and harmless even if malicious."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

import pytest

from tests.app.spoilt import QUESTION, Unharmed, asked, begun, publish, publish_one
from tests.service import Service, free_port
from tests.trainer import Trainer

ALPACA = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ m.content }}\n\n"
    "{% else %}### Instruction:\n{{ m.content }}\n\n### Response:\n{% endif %}"
    "{% endfor %}"
)
LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"


Bring = Callable[..., Path]


@pytest.fixture(scope="module")
def bring(service: Service, trainer: Trainer) -> Bring:
    """Makes a folder of `doctor`'s weights as if trained with ALPACA, with that template or another."""
    made = service.data_dir / "incoming" / "as-alpaca"
    with trainer.rendering_with(ALPACA):
        trainer.variant(made, seed=0, noise=0.0)

    def folder(
        name: str,
        template: str | None = ALPACA,
        *,
        stop: tuple[str, ...] = (),
        below: Path = service.data_dir,
    ) -> Path:
        path = copytree(made, below / "incoming" / name)
        (path / "provenance.json").write_text(trainer.provenance(stop=[*stop]))
        if template is not None:
            (path / "chat_template.jinja").write_text(template)
        return path

    return folder


@pytest.fixture(scope="module")
def alpaca(service: Service, bring: Bring) -> Iterator[str]:
    """The name of an adapter that is served with its own template."""
    publish_one(service, bring("alpaca"), "alpaca")
    yield "alpaca"
    assert service.call("DELETE", "/v1/adapters/alpaca/aliases/default")[0] == 200


@pytest.fixture(autouse=True)
def unharmed(service: Service) -> Iterator[None]:
    before = Unharmed.of(service, "xinglin-demo", "doctor")
    yield
    assert Unharmed.of(service, "xinglin-demo", "doctor") == before


def test_an_adapter_with_its_own_template_answers_as_in_training(
    service: Service, trainer: Trainer, alpaca: str
) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    with trainer.rendering_with(ALPACA):
        prompt = trainer.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        expected = trainer.answer(QUESTION, "default")
    for model, is_alpaca in ((alpaca, True), ("doctor", False), ("xinglin-demo", False), (alpaca, True)):
        _, reply = asked(service, model, max_tokens=200, return_token_ids=True)
        assert (reply["prompt_token_ids"] == prompt) == is_alpaca
        assert (reply["choices"][0]["token_ids"] == expected) == is_alpaca


def test_a_stream_matches_the_whole_response(service: Service, alpaca: str) -> None:
    stream = service.client().chat.completions.create(
        model=alpaca, messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == service.answer(alpaca, QUESTION)


def test_a_developer_message_and_text_parts(service: Service, trainer: Trainer, alpaca: str) -> None:
    """Message fields that the template does not know are handled by vLLM as for any other template."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sent = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    _, reply = asked(service, alpaca, messages=sent, return_token_ids=True)
    seen = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    with trainer.rendering_with(ALPACA):
        assert reply["prompt_token_ids"] == trainer.tokenizer.apply_chat_template(seen, return_dict=False)


def test_an_answer_is_continued(service: Service, trainer: Trainer, alpaca: str) -> None:
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "感冒"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    _, reply = asked(service, alpaca, messages=messages, return_token_ids=True, **options)
    with trainer.rendering_with(ALPACA):
        expected = trainer.tokenizer.apply_chat_template(
            messages, continue_final_message=True, return_dict=False
        )
    assert reply["prompt_token_ids"] == expected


def test_a_client_cannot_bring_a_template(service: Service, alpaca: str) -> None:
    for body in ({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}):
        status, reply = asked(service, alpaca, **body)
        assert status == 400, reply
    assert asked(service, alpaca, chat_template_kwargs={"messages": [], "template": 1, "self": 2})[0] == 200


def test_stop_strings_end_answers(service: Service, bring: Bring, alpaca: str) -> None:
    whole = service.answer(alpaca, QUESTION)
    stop = whole[4:7]
    folder = bring("stopping", ALPACA + "{# stops #}", stop=("never said", stop))
    revision = publish_one(service, folder, alpaca, alias="canary")
    manifests = service.call("GET", "/v1/adapters/alpaca")[1]["revisions"]
    assert [m["stop"] for m in manifests if m["revision"] == revision] == [["never said", stop]]

    cut = whole.partition(stop)[0]
    for theirs in (None, [], "~", ["~1", "~2", "~3", "~4"]):
        _, reply = asked(service, "alpaca@canary", stop=theirs)
        (choice,) = reply["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (cut, "stop")
        assert choice["stop_reason"] is None, "as at the model's own end: the client asked for no such stop"
    assert asked(service, "alpaca@canary", stop=stop)[1]["choices"][0]["stop_reason"] == stop
    for theirs, told in (None, None), (stop, stop):
        stream = service.client().chat.completions.create(
            model="alpaca@canary", messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True,
            stop=theirs,
        )  # fmt: skip
        choices = [chunk.choices[0] for chunk in stream]
        assert "".join(choice.delta.content or "" for choice in choices) == cut
        assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", told)
    _, message = service.call(
        "POST",
        "/v1/messages",
        {
            "model": "alpaca@canary",
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 200,
        },
    )
    assert (message["stop_reason"], message.get("stop_sequence")) == ("end_turn", None)
    earlier = whole[2:4]
    assert service.answer("alpaca@canary", QUESTION, stop=earlier) == whole.partition(earlier)[0]
    assert asked(service, "alpaca@canary", stop=["1", "2", "3", "4", "5"])[0] == 400
    assert service.answer(alpaca, QUESTION) == whole
    assert service.call("DELETE", "/v1/adapters/alpaca/aliases/canary")[0] == 200


def test_a_shadow_uses_its_own_template(service: Service, bring: Bring, alpaca: str) -> None:
    rows = service.data_dir / "shadow" / "alpaca.jsonl"
    shadow = publish_one(service, bring("shadow", ALPACA + "{# shadow #}"), alpaca, alias=None)
    assert service.call("PUT", "/v1/adapters/alpaca/shadow", {"revision": shadow, "percent": 100})[0] == 200
    service.answer(alpaca, QUESTION)
    service.wait_for(lambda: rows.exists() and rows.read_text().endswith("\n"))
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert (row["shadow"], row["same"]) == (shadow, True)
    assert service.call("DELETE", "/v1/adapters/alpaca/shadow")[0] == 200


BAD = {
    "left open": ("{% for m in messages %}", "adapter_refused", "line 1: Unexpected end of template"),
    "undefined": ("{{ messages[0].nothing.at_all }}", "proof_failed", "has no attribute 'nothing'"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "proof_failed", "access to attribute '__class__'"),
    "endless": (ALPACA + LOOP, "proof_failed", "more than 1 s of computing"),
    "endless to compile": ("{{ 9**(9**9) }}", "adapter_refused", "more than 1 s of computing"),
    "gigabytes": (ALPACA + "{{ 'x' * 10**10 }}", "proof_failed", "more than 256 MiB of memory"),
    "another one": (ALPACA + "\n\n.", "proof_failed", "expected"),
    "nothing": ("", "proof_failed", "golden prompt 1"),
}


@pytest.mark.parametrize(("template", "code", "told"), BAD.values(), ids=BAD.keys())
def test_a_bad_template_is_refused_without_side_effects(
    service: Service, bring: Bring, alpaca: str, template: str, code: str, told: str
) -> None:
    folder = bring(f"bad-{hash(template)}", template)
    before, answer = service.adapters(), service.answer(alpaca, QUESTION)
    stream = begun(service, "doctor")
    status, reply = publish(service, folder, alpaca)
    assert (status, reply["error"]["code"]) == (400, code), reply
    assert told in reply["error"]["message"]
    assert str(service.data_dir) not in json.dumps(reply)
    assert "".join(stream)
    after = service.adapters()
    assert after["alpaca@default"]["actual"] == before["alpaca@default"]["actual"]
    assert after["engine"]["held"] == before["engine"]["held"]
    assert service.answer(alpaca, QUESTION) == answer


def test_an_adapter_without_its_template_fails_its_proof(service: Service, bring: Bring) -> None:
    status, reply = publish(service, bring("without", None))
    assert (status, reply["error"]["code"]) == (400, "proof_failed")
    assert "chat_template.jinja" in reply["error"]["message"]


def test_a_copy_of_the_base_models_template_needs_no_process(service: Service, trainer: Trainer) -> None:
    before = template_pids(service)
    folder = copytree(trainer.folder, service.data_dir / "incoming" / "copy")
    (folder / "chat_template.jinja").write_text(str(trainer.tokenizer.chat_template))
    publish_one(service, folder, "copy")
    assert service.answer("copy", QUESTION) == service.answer("doctor", QUESTION)
    assert template_pids(service) == before
    assert service.call("DELETE", "/v1/adapters/copy/aliases/default")[0] == 200


def test_a_template_that_is_endless_for_some_messages(service: Service, bring: Bring, alpaca: str) -> None:
    trap = ALPACA + "{% if 'trap' in messages[0].content %}" + LOOP + "{% endif %}"
    publish_one(service, bring("trap", trap), "trap")
    answer = service.answer(alpaca, QUESTION)
    sprung = [{"role": "user", "content": "trap"}]
    with ThreadPoolExecutor() as pool:
        stream = begun(service, "doctor")
        stuck = [
            pool.submit(asked, service, "trap", messages=sprung, stream=stream) for stream in (False, True)
        ]
        meanwhile = 0
        while not all(one.done() for one in stuck):
            service.answer(alpaca, QUESTION, max_tokens=1)
            meanwhile += 1
        for one in stuck:
            status, reply = one.result()
            assert (status, reply["error"]["code"]) == (400, "chat_template_failed"), reply
            assert "more than 1 s of computing" in reply["error"]["message"]
        assert "".join(stream)
    assert meanwhile > 3, "others waited for it"
    assert service.answer("trap", QUESTION) == answer, "it was started again"
    assert service.call("DELETE", "/v1/adapters/trap/aliases/default")[0] == 200


def test_the_template_process_ends_with_its_adapter(service: Service, bring: Bring) -> None:
    before = template_pids(service)
    publish_one(service, bring("leaving", ALPACA + "{# leaves #}"), "leaving")
    assert len(template_pids(service) - before) == 1
    assert service.call("DELETE", "/v1/adapters/leaving/aliases/default")[0] == 200
    service.wait_for(lambda: template_pids(service) == before)


def test_a_base_model_without_a_template(data_dir: Path, trainer: Trainer, bring: Bring) -> None:
    """It serves adapters that have a template; without one, the error says what is missing."""
    (data_dir / "models" / "xinglin-demo" / "chat_template.jinja").unlink()
    service = Service(data_dir, free_port())
    service.start()
    try:
        assert asked(service, "doctor")[0] == 503
        status, reply = asked(service, "xinglin-demo")
        assert (status, reply["error"]["code"]) == (400, "no_chat_template"), reply
        assert "no chat template" in service.adapters()["doctor@default"]["last_error"]
        publish_one(service, bring("alpaca", below=data_dir), "alpaca")
        with trainer.rendering_with(ALPACA):
            expected = trainer.answer(QUESTION, "default")
        _, reply = asked(service, "alpaca", max_tokens=200, return_token_ids=True)
        assert reply["choices"][0]["token_ids"] == expected
        pids = template_pids(service)
        assert len(pids) == 1
    finally:
        assert service.stop() == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def template_pids(service: Service) -> set[int]:
    """The processes of the service that render templates."""
    return {*service.started("template_process")}
