"""Renders one chat template where it can do no harm: `python -m app.engine.template_process`.

JSON lines on stdin, the template and then one object of variables for each rendering; on stdout one line for
each, {"text": ...} or {"error": ...}. What takes too much memory is such an error; what takes too much time ends the
process. It is meant to be ended, and imports little so that the next one is there soon.

Renders as transformers' `apply_chat_template` does. Its environment is made again here, because importing
it takes a second and three times the memory; a test holds the one to the other.
"""

import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

CPU_SECONDS = 1.0
"""Of computing for compiling or for one rendering, which take about a thousandth of it."""
MEMORY_MIB = 256
MAX_CHARACTERS = 4 << 20  # a request's body is no longer
_MAX_REASON = 300
_CUT_HERE = "CONTINUE_FINAL_MESSAGE_TAG "


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what training learns from, says nothing when rendering a prompt."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> Any:
        return caller()


def compiled(text: str) -> jinja2.Template:
    """The template in transformers' environment. Raises jinja2.TemplateError, and whatever else it provokes."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
    return environment.from_string(text)


def rendered(
    template: jinja2.Template,
    /,
    messages: list[dict[str, Any]],
    *,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The prompt; with `continue_final_message` it ends where the last message does."""
    if not continue_final_message:
        return template.render({**variables, "messages": messages})
    last = messages[-1]["content"]
    marked = [*messages[:-1], {**messages[-1], "content": last + _CUT_HERE}]
    text = template.render({**variables, "messages": marked})
    at = text.rfind(_CUT_HERE.strip())
    if at < 0 or last.strip() not in text:
        raise jinja2.TemplateError("the last message is not in the prompt and cannot be continued")
    # A template that strips its messages has stripped the mark too.
    return text[:at] if text.startswith(_CUT_HERE, at) else text[:at].rstrip()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _reason(error: Exception) -> str:
    """What a client is told."""
    if isinstance(error, MemoryError):
        reason = f"it takes more than {MEMORY_MIB} MiB of memory"
    elif isinstance(error, jinja2.TemplateSyntaxError):
        reason = f"line {error.lineno}: {error.message}"
    elif isinstance(error, jinja2.TemplateError):
        reason = str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON] + "…"


def as_line(value: Any) -> bytes:
    """JSON as it goes through the pipes."""
    # A client's text may hold half a surrogate pair: what comes of it is for the tokenizer to say.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MIB << 20, MEMORY_MIB << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # of files: it has none to write
    os.nice(10)  # answers under way come first


def main() -> None:
    _limit()
    template: jinja2.Template | None = None
    for line in sys.stdin.buffer:
        # Ends the process by SIGPROF, which no Python code could hold up, not even one long step in C.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            if template is None:
                template = compiled(json.loads(line))
                text = ""
            else:
                text = rendered(template, **json.loads(line))
            if len(text) > MAX_CHARACTERS:
                raise jinja2.TemplateError(
                    f"it makes a prompt of more than {MAX_CHARACTERS >> 20} Mi characters"
                )
            answer = as_line({"text": text})
        except Exception as error:
            answer = as_line({"error": _reason(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
