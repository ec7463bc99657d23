"""Shadow requests: a revision answers copies of real requests, and only a comparison is kept.

Copies are answered after their originals, one at a time, and only if the revision is resident and a slot is free. A
copy is aborted as soon as any request has to wait. So a shadow never delays or changes an answer.
"""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from adapters import Manifest
from adapters.ref import folder_name
from app.engine.base import Endpoint
from app.errors import ApiError
from app.exchange.observers import Texts
from app.lifecycle.bases import Bases
from app.lifecycle.residency import Lease
from app.metrics import Metrics

logger = logging.getLogger(__name__)

_MAX_WAITING = 64
_MAX_FILE_BYTES = 64 << 20


@dataclass
class Original:
    """An answered request and its answer."""

    request_id: str
    body: Mapping[str, Any]
    answered_by: Manifest
    shadow: Manifest
    texts: Texts
    """The texts of the answer."""
    started: float
    """On time.perf_counter's clock."""
    seconds: float = 0.0


class Shadow:
    """Answers copies in the background; start `run` as a task."""

    def __init__(self, folder: Path, bases: Bases, metrics: Metrics, *, keep_texts: bool) -> None:
        """Comparisons go to `<folder>/<name>.jsonl`, with the texts only if `keep_texts`."""
        self._folder = folder
        self._bases = bases
        self._metrics = metrics
        self._keep_texts = keep_texts
        self._waiting: deque[Original] = deque()
        self._arrived = asyncio.Event()
        self._files: dict[str, RotatingFileHandler] = {}

    def offer(self, original: Original) -> None:
        """Queue an answered request. Returns at once; drops it when the queue is full."""
        original.seconds = time.perf_counter() - original.started
        if len(self._waiting) >= _MAX_WAITING:
            self._count(original, "dropped")
            return
        self._waiting.append(original)
        self._arrived.set()

    async def run(self) -> None:
        """Answer copies until cancelled."""
        while True:
            await self._arrived.wait()
            while self._waiting:
                original = self._waiting.popleft()
                try:
                    self._count(original, await self._answer(original))
                except ApiError as error:
                    logger.info("shadow %s failed on a copied request: %s", original.shadow.name, error)
                    self._count(original, "failed")
                except Exception:
                    logger.exception("a shadow request failed")
                    self._count(original, "failed")
            self._arrived.clear()

    def _count(self, original: Original, outcome: str) -> None:
        self._metrics.shadow_answers.labels(original.shadow.name, outcome).inc()

    async def _answer(self, original: Original) -> str:
        residency = self._bases.of(original.shadow).residency
        lease = residency.lease_if_free(original.shadow)
        if lease is None:
            return "dropped"
        started = time.perf_counter()
        residency.has_line.clear()
        with lease:
            answer = asyncio.create_task(_whole_answer(lease, original.body))
            somebody_waits = asyncio.create_task(residency.has_line.wait())
            try:
                await asyncio.wait({answer, somebody_waits}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    return "dropped"
                ours = answer.result().whole()
            finally:
                for task in (answer, somebody_waits):
                    task.cancel()
                    with suppress(asyncio.CancelledError, ApiError):
                        await task
        theirs = original.texts.whole()
        await asyncio.to_thread(self._write, original, theirs, ours, time.perf_counter() - started)
        return "same" if theirs == ours else "different"

    def _write(self, original: Original, theirs: list[str], ours: list[str], seconds: float) -> None:
        same = [_alike(one, other) for one, other in zip(theirs, ours, strict=False)]
        row = {
            "at": time.time(),
            "request_id": original.request_id,
            "answered_by": original.answered_by.revision,
            "shadow": original.shadow.revision,
            "same": theirs == ours,
            "characters": [len(text) for text in theirs],
            "shadow_characters": [len(text) for text in ours],
            "same_characters": same,
            "seconds": round(original.seconds, 4),
            "shadow_seconds": round(seconds, 4),
        }
        if self._keep_texts:
            row |= {"messages": original.body["messages"], "texts": theirs, "shadow_texts": ours}
        name = original.shadow.name
        if name not in self._files:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self._folder / f"{folder_name(name)}.jsonl"
            self._files[name] = RotatingFileHandler(
                path, maxBytes=_MAX_FILE_BYTES, backupCount=1, encoding="utf-8"
            )
        line = json.dumps(row, ensure_ascii=False)
        self._files[name].emit(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        """Close all comparison files."""
        for file in self._files.values():
            file.close()


async def _whole_answer(lease: Lease, body: Mapping[str, Any]) -> Texts:
    whole = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
    texts = Texts()
    await lease.engine.answer(
        Endpoint.CHAT,
        whole,
        request_id=f"shadow-{time.time_ns()}",
        adapter=lease.adapter,
        fingerprint="",
        observer=texts,
    )
    return texts


def _alike(one: str, other: str) -> int:
    """Return the length of the common prefix in characters."""
    differ = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))
