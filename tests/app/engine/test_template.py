"""Adapters' chat templates in separate processes: rendered as transformers does, and within limits."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from app.engine import template as template_module
from app.engine.template import Template, Templates
from app.engine.template_process import CPU_SECONDS, compiled, rendered
from app.errors import AdapterUnavailable, BadRequest
from tests.processes import children
from tests.service import ROOT

MESSAGES = [
    {"role": "system", "content": " 你是医生。\n"},
    {"role": "user", "content": "<b>头痛</b>怎么办? \"'&"},
    {"role": "assistant", "content": "多休息。 "},
    {"role": "user", "content": "谢谢"},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
SOUND = {
    "ours": "{%- for m in messages %}\n  {% generation %}{{ m.content | trim }}{% endgeneration %}\n{%- endfor %}",
    "blocks": "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n  {{ m.role }}\n{% endfor %}",
    "generation is a scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ tools | tojson }}",
    "a date": "{{ strftime_now('%Y') }}",
    "undefined": "{{ nothing }}{{ nothing is defined }}{{ tools is none }}{{ add_generation_prompt }}",
    "namespace": "{% set n = namespace(c=0) %}{% for m in messages %}{% set n.c = n.c + 1 %}{% endfor %}{{ n.c }}",
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
} | {path.stem: path.read_text() for path in sorted((ROOT / "training" / "templates").glob("*.jinja"))}

LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
TIME, MEMORY = "more than 1 s of computing", "more than 256 MiB of memory"
DOES_NOT_COMPILE = {
    "a block left open": ("{% for m in messages %}", "line 1: Unexpected end of template"),
    "an unknown tag": ("{{ 1 }}\n{% python %}", "line 2: Encountered unknown tag 'python'"),
    "a constant that takes hours": ("{{ 9**(9**9) }}", TIME),
    "brackets without end": ("{{ " + "[" * 100_000, "recursion"),
}
DOES_NOT_RENDER = {
    "an endless loop": (LOOP, TIME),
    "one step that takes hours": ("{{ (messages|length + 8) ** (9 ** 9) }}", TIME),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    "a constant of gigabytes": ("{{ 'x' * 10**10 }}", MEMORY),
    "gigabytes": ("{{ messages[0].content * 10**10 }}", MEMORY),
    "gigabytes, bit by bit": ("{% for a in range(100000) %}{{ 'x' * 100000 }}{% endfor %}", MEMORY),
    "text that doubles": (
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", MEMORY,
    ),
    "a long range": ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
    "a long prompt": ("{{ messages[1].content * 10**6 }}", "more than 4 Mi characters"),
    "Python's insides": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    "Python's globals": ("{{ messages.append.__globals__ }}", "unsafe"),
    "changing its input": ("{{ messages.append(1) }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "undefined": ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
    "its own objection": ("{{ raise_exception('角色必须交替') }}", "角色必须交替"),
    "a long objection": ("{{ raise_exception('x' * 9999) }}", "xxx…"),
}  # fmt: skip


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("template", SOUND.values(), ids=SOUND.keys())
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_it_renders_as_transformers_does(template: str, add_generation_prompt: bool) -> None:
    (theirs,), _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=template, add_generation_prompt=add_generation_prompt,
        **VARIABLES,
    )  # fmt: skip
    ours = rendered(compiled(template), MESSAGES, add_generation_prompt=add_generation_prompt, **VARIABLES)
    assert ours == theirs


@pytest.mark.parametrize("content", ["多休息", " 多休息。 \n"])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_a_last_message_is_continued_as_transformers_does(content: str, trim: str) -> None:
    template = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content{trim} }}}}</s>\n{{% endfor %}}"
    messages = [*MESSAGES[:2], {"role": "assistant", "content": content}]
    (theirs,), _ = render_jinja_template(
        conversations=[messages], chat_template=template, continue_final_message=True, **VARIABLES
    )
    assert rendered(compiled(template), messages, continue_final_message=True, **VARIABLES) == theirs


def test_any_text_is_rendered() -> None:
    async def test() -> None:
        template = Template("{% for m in messages %}{{ m.content }}|{% endfor %}")
        assert await template.render({"messages": MESSAGES}) == "".join(m["content"] + "|" for m in MESSAGES)
        strange = "\ud800\u2028\0\n" + "感" * 1_000_000
        found = await template.render({"messages": [{"content": strange}]})
        assert found == strange + "|"
        await template.close()

    run(test)


@pytest.mark.parametrize(("text", "told"), DOES_NOT_COMPILE.values(), ids=DOES_NOT_COMPILE.keys())
def test_templates_that_do_not_compile(text: str, told: str) -> None:
    async def test() -> None:
        templates = Templates()
        for _ in range(2):
            with pytest.raises(BadRequest, match="chat template cannot be rendered: ") as caught:
                await templates.open(text)
            assert told in str(caught.value)
            assert len(str(caught.value)) < 400
        assert not _children()

    run(test)


@pytest.mark.parametrize(("text", "told"), DOES_NOT_RENDER.values(), ids=DOES_NOT_RENDER.keys())
def test_templates_that_do_not_render(text: str, told: str) -> None:
    """Each fails for the expected reason, and still renders other messages."""

    async def test() -> None:
        template = Template("{% if messages|length == 4 %}" + text + "{% endif %}")
        for _ in range(2):
            with pytest.raises(BadRequest) as caught:
                await template.render({"messages": MESSAGES})
            assert told in str(caught.value)
            assert caught.value.code == "chat_template_failed"
            assert len(str(caught.value)) < 400
            assert await template.render({"messages": []}) == ""
        await template.close()
        assert not _children()

    run(test)


def test_exit_status_is_reported_even_if_asyncio_reaps_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, the thread that waits for the process may run long after the process has ended."""
    prompt = asyncio.ThreadedChildWatcher._do_waitpid

    def late(*arguments: Any) -> None:
        time.sleep(2 * CPU_SECONDS)  # the process has ended meanwhile
        prompt(*arguments)

    monkeypatch.setattr(asyncio.ThreadedChildWatcher, "_do_waitpid", late)

    async def test() -> None:
        with pytest.raises(BadRequest, match=TIME):
            await Template("{{ 9**(9**9) }}").compile()
        assert not _children()

    run(test)


def test_a_slow_template_does_not_stall_others() -> None:
    async def test() -> None:
        slow, quick = Template(LOOP), Template("{{ messages[0].content }}")
        await slow.compile()
        await quick.compile()
        stuck = asyncio.create_task(slow.render({"messages": MESSAGES}))
        rounds = 0
        while not stuck.done():
            assert await quick.render({"messages": [{"content": "hello"}]}) == "hello"
            rounds += 1
        assert rounds > 20
        with pytest.raises(BadRequest):
            await stuck
        await slow.close()
        await quick.close()

    run(test)


def test_the_wait_for_a_rendering_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "_WAIT_SECONDS", 5)

    async def test() -> None:
        template = Template(LOOP)
        stuck = [template.render({"messages": MESSAGES}) for _ in range(12)]
        errors = await asyncio.gather(*stuck, return_exceptions=True)
        assert {type(error) for error in errors} == {BadRequest, AdapterUnavailable}
        await template.close()
        assert not _children()

    run(test)


def test_a_cancelled_rendering_leaves_no_answer_for_the_next() -> None:
    async def test() -> None:
        template = Template("{% if messages %}" + LOOP + "{% endif %}fine")
        await template.compile()
        left = asyncio.create_task(template.render({"messages": MESSAGES}))
        await asyncio.sleep(0.1)
        left.cancel()
        assert await template.render({"messages": []}) == "fine"
        assert left.cancelled()
        await template.close()

    run(test)


def test_equal_templates_share_a_process_until_the_last_is_closed() -> None:
    async def test() -> None:
        templates = Templates()
        one, two, other = [await templates.open(text) for text in ("{{ 1 }}", "{{ 1 }}", "{{ 2 }}")]
        assert one is two
        assert len(_children()) == 2
        await templates.close(one)
        assert await two.render({"messages": []}) == "1"
        await templates.close(two)
        assert len(_children()) == 1
        assert await other.render({"messages": []}) == "2"
        await templates.close_all()
        assert not _children()

    run(test)


def test_the_process_has_no_secrets_and_no_data() -> None:
    async def test() -> None:
        template = Template("{{ 1 }}")
        await template.compile()
        (pid,) = _children()
        process = Path(f"/proc/{pid}")
        names = {line.partition(b"=")[0] for line in (process / "environ").read_bytes().split(b"\0") if line}
        assert names <= {b"PATH", b"LD_LIBRARY_PATH", b"LANG", b"LC_ALL", b"TZ", b"PYTHONPATH"}
        assert (process / "cwd").resolve() == Path("/")
        limits = (process / "limits").read_text()
        assert str(256 << 20) in limits
        await template.close()

    run(test)


def test_text_that_looks_like_the_protocol() -> None:
    """A message that looks like a line of the protocol is treated as text."""

    async def test() -> None:
        template = Template("{{ messages[0].content }}")
        text = json.dumps({"error": "x"}) + "\n" + json.dumps({"text": "y"})
        assert await template.render({"messages": [{"content": text}]}) == text
        await template.close()

    run(test)


def _children() -> list[int]:
    """Return the template processes of this process; a service that runs beside the tests has its own."""
    return children(os.getpid(), "template_process")
