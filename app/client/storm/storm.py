"""Run a storm: set up, measure without swaps (calm), swap under load (storm), clean up, report."""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adapters import AdapterStore
from app.access.keys import KEY_FILE
from app.client.storm import stage as staging
from app.client.storm.actions import Operator
from app.client.storm.client import Answer, CallFailed, Client
from app.client.storm.judge import Judge, Timeline
from app.client.storm.ledger import Ledger
from app.client.storm.load import under_load
from app.client.storm.report import Figures, figures, hurt, table
from app.client.storm.stage import CannotStart, seeded

EXIT_HURT = 1
EXIT_CANNOT_START = 2
EXIT_STOPPED = 130


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    try:
        key = _key(getattr(options, "key", None), options.data_dir)
        found, is_stopped = asyncio.run(_run(options, key))
    except KeyboardInterrupt:  # the second Ctrl-C
        return EXIT_STOPPED
    except CannotStart as error:
        print(f"swap-storm cannot start: {error}", file=sys.stderr)  # noqa: T201 - command line
        return EXIT_CANNOT_START
    print(table(found))  # noqa: T201 - the report
    if path := getattr(options, "json", None):
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if is_stopped:
        return EXIT_STOPPED
    return EXIT_HURT if hurt(found) else 0


def _key(given: str | None, data_dir: Path) -> str:
    if key := given or os.environ.get("XINGLIN_ADMIN_KEY"):
        return key
    try:
        return (data_dir / KEY_FILE).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise CannotStart(
            "no admin key: set XINGLIN_ADMIN_KEY to the service's, or --data-dir to the service's data directory"
        ) from error


async def _run(options: argparse.Namespace, key: str) -> tuple[Figures, bool]:
    stop = asyncio.Event()
    ledger, timeline = Ledger(), Timeline()
    bar: tqdm[Any] = tqdm(total=options.swaps, unit="swap", disable=None, desc="setting up")
    with _ctrl_c(stop), bar:
        async with Client(options.url, key) as client:
            base_model, originals = await staging.find(
                client, AdapterStore(options.data_dir / "store"), ledger
            )
            chance = seeded(options.seed, "operator")

            async def ask(model: str, session: str | None) -> Answer:
                number = chance.randrange(len(stage.questions))
                answer = await client.ask(model, number, stage.questions[number], session)
                ledger.add(answer)
                return answer

            def on_swap() -> None:
                bar.update(ledger.swaps - bar.n)
                failed = sum(1 for answer in ledger.answers[-1000:] if answer.failure)
                bar.set_postfix_str(f"{len(ledger.answers)} answers, {failed} of the last 1000 failed")

            async def operate() -> None:
                bar.set_description("storm")
                await operator.run(options.swaps, stage.adapters, stage.gone, stage.crowd, stop, on_swap)

            operator = Operator(client, originals, timeline, ledger, chance, ask)
            try:
                stage = await staging.build(
                    client, operator, base_model, originals, timeline, ledger, adapters=options.adapters,
                    on_step=bar.set_description,
                )  # fmt: skip
                before = await _metrics(client)
                bar.set_description("calm")
                await under_load(
                    client, [base_model, *(adapter.name for adapter in stage.adapters)], stage.questions, ledger,
                    operate, streams=options.streams, seconds=options.seconds, seed=options.seed, stop=stop,
                )  # fmt: skip
                metrics = before, await _metrics(client)
            finally:
                bar.set_description("cleaning up")
                leaked = await staging.clear(client, adapters=options.adapters)
    judge = Judge(stage.base_model, stage.references, timeline)
    return figures(ledger, judge, metrics, leaked), stop.is_set()


async def _metrics(client: Client) -> str:
    try:
        return await client.text("/metrics")
    except CallFailed:  # the service died, which the failed answers show
        return ""


@contextmanager
def _ctrl_c(stop: asyncio.Event) -> Iterator[None]:
    """End the storm with a report at the first Ctrl-C, and at once at the second."""
    loop = asyncio.get_running_loop()
    restore: Callable[[], object] = lambda: loop.remove_signal_handler(signal.SIGINT)  # noqa: E731 - used twice

    def end() -> None:
        stop.set()
        restore()

    loop.add_signal_handler(signal.SIGINT, end)
    try:
        yield
    finally:
        restore()
