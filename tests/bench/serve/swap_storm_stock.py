"""The swap storm against this service and against stock vLLM, one after the other on the same machine.

python -m tests.bench.serve.swap_storm_stock --swaps 60 --json both.json

Both get the same base model, adapters, questions, load and engine settings. Stock has no versions, canary,
shadow, rollback, proof or eviction to try: its storm is what it can do, loading another adapter over a name
(load_inplace) and unloading a name and loading it again. Needs the demo's products (`make demo` or
`make test` once), and the CPU to itself.
"""

import argparse
import asyncio
import io
import json
import os
import random
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from adapters import AdapterStore, fingerprint
from app.client.storm import add_parser
from app.client.storm.client import Answer, CallFailed, Client
from app.client.storm.judge import BASE, Judge, Timeline
from app.client.storm.ledger import Ledger
from app.client.storm.load import under_load
from app.client.storm.report import Figures, figures
from app.client.storm.stage import Messages, heard_alone, questions_of, seeded, telling
from app.client.storm.variants import Original, find_originals, variant
from tests.bench.serve.stock import BASE_MODEL, stock_server, wait_for_health
from tests.conftest import copy_products
from tests.service import ADMIN_KEY, ROOT, Service, free_port

ADAPTERS = ("storm-0", "storm-1", "storm-2")
GONE = "storm-gone"


class StockOperator:
    """Swaps names of a stock server in the two ways it has."""

    def __init__(
        self, client: Client, originals: Sequence[Original], folder: Path, timeline: Timeline, ledger: Ledger,
        chance: random.Random,
    ) -> None:  # fmt: skip
        self._client = client
        self._originals = originals
        self._folder = folder
        self._timeline = timeline
        self._ledger = ledger
        self._chance = chance
        self._history: dict[str, list[str]] = {}
        """By name: the folders loaded under it, the present one last."""

    async def load(self, name: str, made_of: int | None = None, *, inplace: bool) -> None:
        """Load a new variant that answers otherwise than the present one under `name`."""
        history = self._history.setdefault(name, [])
        present = self._timeline.made_of[history[-1]] if history else None
        if made_of is None:
            made_of = next(i for i, one in enumerate(self._originals) if one.ref != present)
        packed = variant(self._originals[made_of], random.Random(self._chance.random()))
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        self._timeline.made_of[str(folder)] = self._originals[made_of].ref
        await self._load(name, str(folder), inplace=inplace)

    async def _load(self, name: str, folder: str, *, inplace: bool) -> None:
        history = self._history.setdefault(name, [])
        self._timeline.begin(name, folder, perf_counter())
        await self._post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder, "load_inplace": inplace}
        )
        if history:
            self._timeline.end(name, history[-1], perf_counter())
        history.append(folder)

    async def unload(self, name: str) -> None:
        """Make the server forget `name`."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        self._timeline.end(name, self._history[name][-1], perf_counter())

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        try:
            await self._client.call("POST", path, body)
        except CallFailed as error:
            if error.status != 200:  # plain text is how stock says yes
                raise

    async def run(self, swaps: int, seconds: float, questions: Sequence[Messages]) -> None:
        """Swap until it is enough, or so much time has passed."""
        until = perf_counter() + seconds
        asking: list[asyncio.Task[None]] = []
        while self._ledger.swaps < swaps and perf_counter() < until:
            action = self._chance.choices(("new", "back", "unload"), (6, 4, 1))[0]
            name = GONE if action == "unload" else self._chance.choice(ADAPTERS)
            began = perf_counter()
            try:
                if action == "unload":
                    await self.unload(name)
                    self._ledger.swaps += 1
                    await self.load(name, inplace=False)
                elif action == "back" and len(self._history[name]) > 1:
                    await self._load(name, self._history[name][-2], inplace=True)
                else:
                    await self.load(name, inplace=True)
            except CallFailed as error:
                self._ledger.refusals.append(str(error))
                await asyncio.sleep(0.5)
                continue
            self._ledger.swaps += 1
            self._ledger.actions[action] += 1
            what = {"new": "publish to ready", "back": "load to ready", "unload": "unload and load"}[action]
            self._ledger.seconds[what].append(perf_counter() - began)
            asking.append(asyncio.create_task(self._first_token(name, questions, action, began)))
        await asyncio.gather(*asking)

    async def _first_token(self, name: str, questions: Sequence[Messages], action: str, began: float) -> None:
        at = self._chance.randrange(len(questions))
        answer = await self._client.ask(name, at, questions[at])
        self._ledger.add(answer)
        if not answer.tokens_at:
            return
        self._ledger.seconds["ready to first token"].append(answer.tokens_at[0] - answer.sent)
        if action == "back":
            self._ledger.seconds["rollback to first answer"].append(answer.tokens_at[0] - began)


def stock(options: argparse.Namespace, data_dir: Path, folder: Path) -> Figures:
    """One storm on a stock server of its own."""
    server = stock_server(data_dir)
    server.start(until_ready=False)
    try:
        wait_for_health(server)
        return asyncio.run(_stock_storm(options, server.url, data_dir, folder))
    finally:
        server.stop()


async def _stock_storm(options: argparse.Namespace, url: str, data_dir: Path, folder: Path) -> Figures:
    ledger, timeline = Ledger(), Timeline()
    fingerprint_of_base = fingerprint(data_dir / "models" / BASE_MODEL)
    originals = list(find_originals(AdapterStore(data_dir / "store"), fingerprint_of_base))[:2]
    questions = questions_of(originals)
    async with Client(url, "unused") as client:
        operator = StockOperator(
            client, originals, folder, timeline, ledger, seeded(options.seed, "operator")
        )
        references = {BASE: await heard_alone(client, BASE_MODEL, questions)}
        for index, original in enumerate(originals):
            await operator.load(ADAPTERS[0], index, inplace=index > 0)
            references[original.ref] = await heard_alone(client, ADAPTERS[0], questions)
        questions, references = telling(questions, references, ledger)
        for index, name in enumerate((*ADAPTERS[1:], GONE)):
            await operator.load(name, index % 2, inplace=False)
        await under_load(
            client, [BASE_MODEL, *ADAPTERS], questions, ledger,
            lambda: operator.run(options.swaps, options.stock_seconds, questions),
            streams=options.streams, seconds=options.seconds, seed=options.seed, stop=asyncio.Event(),
        )  # fmt: skip
    judge = Judge(BASE_MODEL, references, timeline)
    found = figures(ledger, judge, ("", ""), None)
    by_model = Counter(f"{_kind(answer)}: {judge.verdict(answer)}" for answer in ledger.answers)
    return {**found, "by_model": dict(sorted(by_model.items()))}


def _kind(answer: Answer) -> str:
    return "base model" if answer.model == BASE_MODEL else "adapters"


def ours(options: argparse.Namespace, data_dir: Path) -> Figures:
    """One storm on a service of its own, by the command that users run."""
    service = Service(data_dir, free_port())
    service.start()
    figures_file = data_dir / "figures.json"
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    arguments = parser.parse_args(
        [
            "swap-storm", "--url", service.url, "--key", ADMIN_KEY, "--data-dir", str(data_dir), "--swaps",
            str(options.swaps), "--streams", str(options.streams), "--seconds", str(options.seconds), "--seed",
            str(options.seed), "--json", str(figures_file),
        ]
    )  # fmt: skip
    try:
        arguments.run(arguments)
        found: Figures = json.loads(figures_file.read_text())
    finally:
        service.stop()
    return found


def table(rounds: Sequence[tuple[Figures, Figures]]) -> str:
    """Markdown: a row a measure; the figures of several rounds side by side."""

    def row(label: str, *path: str) -> str:
        sides = []
        for side in (0, 1):
            values = []
            for both in rounds:
                value: Any = both[side]
                for key in path:
                    value = value.get(key) if isinstance(value, dict) else None
                values.append("none" if value is None else str(value))
            sides.append(" / ".join(values))
        return f"| {label} | {sides[0]} | {sides[1]} |"

    answers = ("requests", "failed", "wrong_revision", "unlike_any")
    return "\n".join(
        [
            "| | ours | stock |",
            "|---|---|---|",
            row("swaps", "swaps"),
            row("seconds of storm", "seconds", "storm"),
            *(row(f"{phase}: {kind}", "answers", phase, kind) for phase in ("calm", "storm") for kind in answers),
            *(
                row(f"{phase}: {what} {column}", phase, key, column)
                for phase in ("calm", "storm")
                for what, key, columns in (
                    ("token gap", "token_gap", ("p50_ms", "p99_ms", "max_ms")),
                    ("first token", "first_token", ("p50_ms", "p99_ms")),
                )
                for column in columns
            ),
            *(
                row(f"{what} {column}", "times", what, column)
                for what in ("publish to ready", "load to ready", "ready to first token", "rollback to first answer")
                for column in ("p50_ms", "p99_ms")
            ),
            row("refused calls", "refused_calls"),
        ]
    )  # fmt: skip


def main() -> None:
    """Alternate: ours, stock, ours, stock, …"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / ".cache" / "demo")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--swaps", type=int, default=60)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--stock-seconds", type=float, default=60, help="most that stock's storm may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            folder = Path(scratch, str(number))
            found = [
                ours(options, copy_products(options.data_dir, folder / "ours")),
                stock(options, copy_products(options.data_dir, folder / "stock"), folder),
            ]
            rounds.append((found[0], found[1]))
            if options.json:
                options.json.write_text(json.dumps(rounds, indent=2) + "\n")
    print(table(rounds))
    for _, found_by_stock in rounds:
        print(found_by_stock["by_model"], found_by_stock["failures"], found_by_stock["refusals"])


if __name__ == "__main__":
    main()
