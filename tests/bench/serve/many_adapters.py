"""More adapters than fit: 200 of them, 16 in the engine at once, asked at random by 32 clients.

    python -m tests.bench.serve.many_adapters [--adapters 200] [--resident 16] [--slots 8] [--seconds 60]

Every answer is compared with the one its adapter gives when nobody else asks. Throughput is given as a ratio
to the same clients asking as many adapters as fit, on the same service, in alternating rounds.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from adapters import AdapterStore
from tests.service import ROOT, Service, free_port
from tests.trainer import Trainer

QUESTIONS = ("感冒有什么症状？", "What are the symptoms of gout?", "如何预防糖尿病？")


@dataclass
class Round:
    """What the clients saw in one round."""

    seconds: float = 0.0
    answers: int = 0
    tokens: int = 0
    first_token: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    adapters: set[str] = field(default_factory=set)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


async def _ask(session: aiohttp.ClientSession, url: str, model: str, question: str) -> tuple[str, int, float]:
    """The greedy answer, its number of events, and the seconds until the first of them."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 64,
        "stream": True,
    }
    started, first, events = time.perf_counter(), 0.0, []
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:200]}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                events.append(line)
                if len(events) == 2:  # the first one holds the role alone
                    first = time.perf_counter() - started
    chunks = [json.loads(event[6:]) for event in events]
    if "error" in chunks[-1] or chunks[-1]["choices"][0]["finish_reason"] is None:
        raise RuntimeError("the answer was cut")
    return (
        "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks),
        len(events) - 1,
        first,
    )


async def answers_alone(url: str, names: list[str]) -> dict[tuple[str, str], str]:
    """What each adapter answers to each question when nobody else asks."""
    alone = {}
    async with aiohttp.ClientSession() as session:
        for name in tqdm(names, desc="each alone", file=sys.stderr):
            question = _question(name)
            alone[name, question], _, _ = await _ask(session, url, name, question)
    return alone


def _question(name: str) -> str:
    return QUESTIONS[int(name.rpartition("-")[2]) % len(QUESTIONS)]


async def mixed(
    url: str,
    names: list[str],
    alone: dict[tuple[str, str], str],
    *,
    clients: int,
    seconds: float,
    seed: int = 0,
) -> Round:
    """Clients that ask random adapters, one question after another."""
    seen, until = Round(), time.monotonic() + seconds

    async def client(session: aiohttp.ClientSession, choice: random.Random) -> None:
        while time.monotonic() < until:
            name = choice.choice(names)
            question = _question(name)
            try:
                text, tokens, first = await _ask(session, url, name, question)
            except (RuntimeError, aiohttp.ClientError) as error:
                seen.failures.append(f"{name}: {error!r}")
                continue
            seen.answers += 1
            seen.tokens += tokens
            seen.first_token.append(first)
            seen.adapters.add(name)
            if text != alone[name, question]:
                seen.wrong.append((name, question))

    started = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session, random.Random(seed * 1000 + i)) for i in range(clients)))
    seen.seconds = time.monotonic() - started
    return seen


def memory(service: Service) -> float:
    """MiB (PSS) of the service and its engine."""
    total = 0
    for pid in (service.process.pid, *service.engine_pids()):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def publish_many(store: AdapterStore, trainer: Trainer, count: int, folder: Path) -> list[str]:
    """Publish `count` adapters that all answer differently, each with its golden prompts."""
    names = []
    for number in tqdm(range(count), desc="adapters", file=sys.stderr):
        path = folder / str(number)
        if not (path / "golden.jsonl").exists():
            trainer.variant(path, seed=number, noise=2.0)
        name = f"many-{number:03d}"
        manifest = store.publish(path, name, actor="bench")
        store.set_alias(name, "default", manifest.revision, actor="bench")
        names.append(name)
    return names


def _row(label: str, seen: Round) -> dict[str, Any]:
    first = sorted(seen.first_token)
    return {
        "round": label,
        "answers": seen.answers,
        "adapters": len(seen.adapters),
        "failed": len(seen.failures),
        "wrong": len(seen.wrong),
        "tokens_per_second": round(seen.tokens_per_second, 1),
        "first_token_p50": round(statistics.median(first), 3),
        "first_token_p99": round(first[int(len(first) * 0.99)], 3),
        "first_token_max": round(first[-1], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--resident", type=int, default=16)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    demo = ROOT / ".cache" / "demo"
    kept = ROOT / ".cache" / "many"
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        data_dir = Path(temporary, "data")
        for part in ("models", "store"):
            shutil.copytree(demo / part, data_dir / part)
        names = publish_many(AdapterStore(data_dir / "store"), Trainer(demo), options.adapters, kept)
        limits = {
            "XINGLIN_MAX_RESIDENT": str(options.resident),
            "XINGLIN_MAX_LORAS": str(options.slots),
        }
        service = Service(data_dir, free_port(), limits)
        service.start()
        try:
            return _measure(service, names, options)
        finally:
            service.stop()


def _measure(service: Service, names: list[str], options: argparse.Namespace) -> int:
    alone = asyncio.run(answers_alone(service.url, names))
    print(f"{len(names)} adapters give {len(set(alone.values()))} different answers")
    rows, ratios, used = [], [], [memory(service)]
    fitting = names[: options.resident]
    for number in range(options.rounds):
        pair = []
        for label, some in ((f"{len(fitting)} that fit", fitting), (f"{len(names)}", names)):
            seen = asyncio.run(
                mixed(service.url, some, alone, clients=options.clients, seconds=options.seconds, seed=number)
            )
            used.append(memory(service))
            rows.append(_row(label, seen) | {"memory_mib": round(used[-1])})
            pair.append(seen.tokens_per_second)
            print(json.dumps(rows[-1], ensure_ascii=False), seen.failures[:2], flush=True)
        ratios.append(pair[1] / pair[0])
    print(f"throughput, {len(names)} against {len(fitting)}: {statistics.median(ratios):.2f} {ratios}")
    print(f"memory, MiB: {[round(value) for value in used]}")
    return int(any(row["failed"] or row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
