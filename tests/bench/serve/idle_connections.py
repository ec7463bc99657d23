"""How many requests are lost because the service closes the idle connection that they are sent on.

    python -m tests.bench.serve.idle_connections http://127.0.0.1:8000 [--idle 60] [--spread 0.012] [--requests 10000]

A client or a proxy keeps a connection for a while and sends the next request on it; should the service close it at that
moment, the request meets a closed door, and a POST is not repeated. Each of some hundred connections sends a POST,
waits `--idle` seconds and up to `--spread` more or less, and sends the next. A connection that the service has closed
is opened again, as clients do that see it in time: what is lost is a request that was sent and got no byte. Ask with
the idle times of clients and proxies: 5 (aiohttp's server side and uvicorn's default), 15, 60 (nginx), 75.
"""

import argparse
import asyncio
import json
import random
from collections import Counter
from urllib.parse import urlsplit

CONNECTIONS = 400
_BODY = json.dumps({"model": "xinglin-demo", "prompt": "a"}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument(
        "--idle", type=float, default=60.0, help="seconds between the requests of a connection"
    )
    parser.add_argument("--spread", type=float, default=0.012, help="seconds more or less")
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    found = asyncio.run(_ask(options.url, options.requests, options.idle, options.spread))
    told = ", ".join(f"{count} {what}" for what, count in sorted(found.items()))
    print(f"idle {options.idle:g} s ± {1000 * options.spread:g} ms: {told}")


async def _ask(url: str, requests: int, idle: float, spread: float) -> Counter[str]:
    found: Counter[str] = Counter(answered=0, lost=0)
    rounds = max(2, -(-requests // CONNECTIONS))
    await asyncio.gather(*(_connection(url, rounds, idle, spread, found) for _ in range(CONNECTIONS)))
    return found


async def _connection(url: str, rounds: int, idle: float, spread: float, found: Counter[str]) -> None:
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
    fields = f"host: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(_BODY)}"
    request = f"POST /tokenize HTTP/1.1\r\n{fields}\r\n\r\n".encode() + _BODY
    reader, writer = await asyncio.open_connection(host, port)
    await asyncio.sleep(random.uniform(0, idle / 2))  # not all at the same time
    for _ in range(rounds):
        if reader.at_eof():
            found["closed in time"] += 1
            writer.close()
            reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(request)
            await _reply(reader)
            found["answered"] += 1
        except (OSError, EOFError):
            found["lost"] += 1
            writer.close()
            reader, writer = await asyncio.open_connection(host, port)
        await asyncio.sleep(max(0.0, idle + random.uniform(-spread, spread)))
    writer.close()


async def _reply(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    await reader.readexactly(int(lines[b"content-length"]))


if __name__ == "__main__":
    main()
