"""python -m app swap-storm: proves on a running service that swapping adapters under load hurts nobody."""

import argparse
import os
from pathlib import Path
from typing import Any


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to those of `python -m app`; its `run` takes the options and returns an exit code."""
    command = commands.add_parser(
        "swap-storm",
        help="swap adapters of a running service under load, and check every answer",
        description="Swap adapters of a running service under load, and check every answer. It makes adapters "
        "named storm-* out of two that are in the store, asks them and the base model all the time, and removes "
        "them when it ends. Exit code 0: nobody was hurt; 1: somebody was, as the report says; 2: it could not "
        "start; 130: stopped by Ctrl-C, with a report of what was measured so far.",
        epilog="The admin key is $XINGLIN_ADMIN_KEY or, without one, that of the data directory. "
        "example: python -m app swap-storm --swaps 100 --json storm.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the service")
    add("--key", default=argparse.SUPPRESS, help="admin key; better in $XINGLIN_ADMIN_KEY, which nobody sees")
    add(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("XINGLIN_DATA_DIR") or "xinglin-data"),
        help="where the service keeps its store, for adapters to start from",
    )
    add("--swaps", type=_count, default=1000, help="how many times an alias moves")
    add("--streams", type=_count, default=32, help="how many answers are streamed at once")
    add("--adapters", type=_count, default=3, help="how many adapters are asked and swapped")
    add("--seconds", type=float, default=15.0, help="how long to measure before the first swap")
    add("--seed", type=int, default=0, help="of everything that is drawn by chance")
    add("--json", type=Path, default=argparse.SUPPRESS, help="file for the figures")
    command.set_defaults(run=_run)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _run(options: argparse.Namespace) -> int:
    from app.client.storm.storm import run  # noqa: PLC0415 - --help answers at once

    return run(options)
