"""A minimal service for storms, with one optional fault."""

import asyncio
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from adapters import is_in_share

BASE, FINGERPRINT, KEY = "tiny", "0123456789abcdef", "an-admin-key"
_TOKENS = 4


@dataclass
class FakeService:
    """Answers `<parent>: <question>`, with the parent in the upload's provenance."""

    fault: str = ""
    max_resident: int = 3
    parents: dict[str, str] = field(default_factory=dict)
    published: dict[str, list[str]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], str] = field(default_factory=dict)
    before: dict[str, list[str]] = field(default_factory=dict)
    """Earlier revisions of `default` by name, oldest first."""
    percent: dict[str, float] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    chats: int = 0

    def application(self) -> web.Application:
        """Return the application with all routes."""
        app = web.Application(middlewares=[self._guard])
        alias = "/v1/adapters/{name}/aliases/{alias}"
        app.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/adapters", self._list),
                web.post("/v1/adapters", self._publish),
                web.get("/v1/adapters/{name}", self._show),
                web.put(alias, self._point),
                web.delete(alias, self._remove),
                web.post("/v1/adapters/{name}/rollback", self._roll_back),
                web.post("/v1/adapters/{name}/canary/promote", self._promote),
                web.put("/v1/adapters/{name}/{alias:canary|shadow}", self._point),
                web.delete("/v1/adapters/{name}/{alias:canary|shadow}", self._remove),
                web.post("/v1/adapters/{name}/prune", self._prune),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        changes = request.method != "GET" and "chat" not in request.path
        if changes and request.headers.get("authorization") != f"Bearer {KEY}":
            return _error(401, "invalid_api_key")
        await asyncio.sleep(0.002)
        response: web.StreamResponse = await handler(request)
        return response

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text="")

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": BASE, "parent": None}]})

    # Chat

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            return web.json_response({"system_fingerprint": f"{BASE}@{FINGERPRINT}"})
        revision = self._answering(body["model"], request.headers.get("x-session-id"))
        if revision is None and body["model"] != BASE:
            return _error(404, "model_not_found")
        text = f"{self.parents.get(revision or '', BASE)}: {body['messages'][-1]['content']}"
        self.chats += 1
        is_late = self.chats > 100  # the references are made by then
        if is_late and self.fault == "close" and request.transport:
            request.transport.close()
        if is_late and self.fault == "unlike":
            text = "something else"
        if is_late and self.fault == "base":
            text = text.replace(f"{BASE}:", f"{self.parents[next(iter(self.parents))]}:")
        headers = {"x-adapter-revision": revision} if revision else {}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        size = -(-len(text) // _TOKENS)
        for at in range(_TOKENS):
            await asyncio.sleep(0.001)
            if is_late and self.fault == "cut" and at == _TOKENS - 1:
                return response
            finish = "stop" if at == _TOKENS - 1 else None
            choice = {"delta": {"content": text[at * size : (at + 1) * size]}, "finish_reason": finish}
            await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    def _answering(self, model: str, session: str | None) -> str | None:
        name, _, alias = model.partition("@")
        revision = self.aliases.get((name, alias or "default"))
        canary = self.aliases.get((name, "canary"))
        if canary and not alias:
            drawn = "" if session is None or self.fault == "sides" else session
            if is_in_share(self.percent[name], revision=canary, session=drawn or str(self.chats)):
                return canary
        if self.fault == "stale" and self.chats > 100 and self.before.get(name):
            return self.before[name][0]
        return revision

    # Adapters

    async def _list(self, _: web.Request) -> web.Response:
        data = [{"name": n, "alias": a, "actual": revision} for (n, a), revision in self.aliases.items()]
        held = {f"{name}@{revision}" for (name, _), revision in self.aliases.items()}
        if self.fault == "leak":
            held |= self.left
        engine = {"held": sorted(held), "max_resident": self.max_resident}
        return web.json_response({"data": data, "engines": [engine]})

    async def _show(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        aliases = {alias: revision for (one, alias), revision in self.aliases.items() if one == name}
        return web.json_response({"aliases": aliases, "log": []})

    async def _publish(self, request: web.Request) -> web.Response:
        form = await request.post()
        packed = form["file"]
        assert isinstance(packed, web.FileField)
        content = packed.file.read()
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            provenance = archive.extractfile("provenance.json")
            assert provenance
            parent = json.load(provenance)["parent"]
        revision = hashlib.sha256(content).hexdigest()[:12]
        name = str(form["name"])
        self.parents[revision] = parent
        self.published.setdefault(name, []).append(revision)
        if form["alias"]:
            self._move(name, str(form["alias"]), revision)
        return web.json_response({"revision": revision})

    async def _point(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, alias = request.match_info["name"], request.match_info["alias"]
        if self.fault == "refuse" and alias == "default":
            return _error(400, "adapter_refused")
        self.percent[name] = body.get("percent", 0)
        self._move(name, alias, body["revision"])
        return web.json_response({"revision": body["revision"]})

    async def _remove(self, request: web.Request) -> web.Response:
        name, alias = request.match_info["name"], request.match_info["alias"]
        self.left.add(f"{name}@{self.aliases.pop((name, alias))}")
        return web.json_response({})

    async def _roll_back(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        earlier = [one for one in self.before.get(name, []) if one in self.published[name]]
        if not earlier:
            return _error(400, "nothing_to_roll_back")
        self.aliases[name, "default"] = earlier[-1]
        self.before[name] = earlier[:-1]
        return web.json_response({"revision": earlier[-1]})

    async def _promote(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self._move(name, "default", self.aliases.pop((name, "canary")))
        return web.json_response({})

    async def _prune(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.published:
            return _error(404, "adapter_not_found")
        keep = (await request.json())["keep"]
        revisions = self.published[name]
        old = revisions[: max(len(revisions) - keep, 0)]
        removed = [one for one in old if one not in self.aliases.values()]
        self.published[name] = [one for one in revisions if one not in removed]
        return web.json_response({"removed": removed})

    def _move(self, name: str, alias: str, revision: str) -> None:
        before = self.aliases.get((name, alias))
        if before and alias == "default":
            self.before.setdefault(name, []).append(before)
        self.aliases[name, alias] = revision


def _error(status: int, code: str) -> web.Response:
    return web.json_response({"error": {"message": "no", "code": code}}, status=status)


@contextmanager
def serving(service: FakeService) -> Iterator[str]:
    """Run the service in a thread; yield its URL."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(service.application(), shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        host, port = runner.addresses[0]
        yield f"http://{host}:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())
        loop.close()
