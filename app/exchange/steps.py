"""The steps of every request, as one list.

A step is a function of the exchange: it reads what earlier steps found, adds its own results, and may register calls
for the end of the request. An error that it raises becomes the response. A new step is one line in STEPS.

Every request ends in exactly one of: a whole response, a finish chunk and [DONE], an error body or event, or an abort
in the engine because the client disconnected.
"""

from collections.abc import Awaitable, Callable

from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from app.engine.base import Endpoint
from app.errors import status_of
from app.exchange.body import meant, read_body
from app.exchange.choice import choose_model
from app.exchange.connection import CLIENT_LEFT, ClientLeft, WhileConnected
from app.exchange.event_stream import EventStream
from app.exchange.exchange import Exchange
from app.exchange.load import LOAD_FORMAT, load_header
from app.exchange.observers import Meter, Observers, Texts
from app.exchange.shadow import Original
from app.exchange.state import AppRequest


async def authorize(exchange: Exchange) -> None:
    """Require the right to chat."""
    exchange.state["access"].require_chat(exchange.request)


async def account(exchange: Exchange) -> None:
    """Measure the answer, and add it to the metrics at the end."""
    meter = Meter(exchange.state["metrics"], exchange.started)
    exchange.observers.append(meter)
    exchange.at_end(lambda status: meter.end(exchange.who, status, is_stream=exchange.is_stream))


async def admit(exchange: Exchange) -> None:
    """Take a place among the requests in flight."""
    exchange.held.enter_context(exchange.state["admission"].place())


async def read(exchange: Exchange) -> None:
    """Read the body and check what this service needs of it; the engine checks the rest."""
    exchange.body = await read_body(exchange.request)
    exchange.endpoint = exchange.path or meant(exchange.body)


async def watch(exchange: Exchange) -> None:
    """Cancel the following steps if the client disconnects. Runs after `read`, since both use the receive channel."""
    await exchange.steps.enter_async_context(WhileConnected(exchange.request.receive))


async def choose(exchange: Exchange) -> None:
    """Choose the revision or base model that answers."""
    bases = exchange.state["bases"]
    bases.check_ready()
    exchange.choice = await choose_model(exchange.request, exchange.body["model"], _session(exchange))
    exchange.base = bases.answering(exchange.choice)
    exchange.base.supervisor.check_ready()
    if manifest := exchange.choice.manifest:
        exchange.who = (manifest.name, manifest.revision)
        exchange.headers["x-adapter-revision"] = manifest.revision
    else:
        exchange.who = (exchange.base.name, "base")


def _session(exchange: Exchange) -> str | None:
    user = exchange.body.get("user")
    return exchange.request.headers.get("x-session-id") or (user if isinstance(user, str) else None)


async def shadow(exchange: Exchange) -> None:
    """Collect the answer for comparison, and queue a copy of the request for the shadow at the end."""
    choice, body = exchange.choice, exchange.body
    if exchange.endpoint is not Endpoint.CHAT or choice.shadow in (None, choice.manifest):
        return
    if choice.manifest is None or choice.shadow is None or body.get("use_beam_search"):
        return
    texts = Texts()
    exchange.observers.append(texts)
    original = Original(exchange.id, body, choice.manifest, choice.shadow, texts, exchange.started)
    exchange.at_end(lambda status: exchange.state["shadow"].offer(original) if status == 200 else None)


async def lease(exchange: Exchange) -> None:
    """Lease the chosen revision or base model, which may wait in a queue and load the revision."""
    leased = await exchange.base.residency.lease(exchange.choice.manifest)
    exchange.leased = exchange.held.enter_context(leased)


async def ask(exchange: Exchange) -> None:
    """Send the request to the engine. It awaits a stream's first event, so that an earlier error has its own status."""
    leased, manifest = exchange.leased, exchange.leased.manifest
    exchange.answer = await leased.engine.answer(
        exchange.endpoint,
        exchange.body,
        request_id=exchange.id,
        adapter=leased.adapter,
        fingerprint=manifest.ref if manifest else exchange.base.fingerprint,
        observer=Observers.of(exchange.observers),
    )
    exchange.is_stream = not isinstance(exchange.answer.reply, dict)
    if cut := exchange.answer.cut:
        exchange.headers["x-truncated"] = f"messages={cut.messages}; tokens={cut.tokens}"


async def load(exchange: Exchange) -> None:
    """Add the engine's load to the headers if the client requested it."""
    if (wanted := exchange.request.headers.get(LOAD_FORMAT)) and exchange.base.supervisor.is_ready:
        exchange.headers |= load_header(exchange.base.supervisor.engine.stats, wanted)


STEPS: tuple[Callable[[Exchange], Awaitable[None]], ...] = (
    authorize,
    account,
    admit,
    read,
    watch,
    choose,
    shadow,
    lease,
    ask,
    load,
)


async def respond(request: AppRequest, path: Endpoint | None) -> Response:
    """Take a request through all steps and return its response. `path`: the endpoint; None if the body decides."""
    exchange = Exchange(request, path)
    try:
        async with exchange.steps:
            for step in STEPS:
                await step(exchange)
    except (ClientLeft, ClientDisconnect):
        exchange.end(CLIENT_LEFT)
        return Response(status_code=CLIENT_LEFT)
    except BaseException as error:
        exchange.end(status_of(error))
        raise
    return _reply(exchange)


def _reply(exchange: Exchange) -> Response:
    """Return the response to send. The exchange ends with its last event, or with its background work."""
    reply, rest = exchange.answer.reply, exchange.answer.rest
    if rest is not None:
        rest.add_done_callback(lambda _: exchange.end(200))
    if not isinstance(reply, dict):
        return EventStream(reply, exchange.headers, on_end=exchange.end if rest is None else lambda _: None)
    if rest is None:
        exchange.end(200)
    return JSONResponse(reply, headers=exchange.headers)
