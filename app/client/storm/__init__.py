"""python -m app swap-storm: test on a running service that swapping adapters under load breaks no request."""

import argparse
import os
from pathlib import Path
from typing import Any


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to `python -m app`; its `run` takes the options and returns an exit code."""
    command = commands.add_parser(
        "swap-storm",
        help="swap adapters of a running service under load, and check every answer",
        description="Swap adapters of a running service under load, and check every answer. The command makes "
        "adapters named storm-* from two that are in the store, streams requests to them and to the base model, and "
        "removes them at the end. Exit codes: 0: all checks passed; 1: a check failed, see the report; 2: could not "
        "start; 130: stopped by Ctrl-C, with a report so far.",
        epilog="The admin key is $XINGLIN_ADMIN_KEY or, if unset, admin.key of the data directory. "
        "example: python -m app swap-storm --swaps 100 --json storm.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--url", default="http://127.0.0.1:8000", help="URL of the service")
    add(
        "--key",
        default=argparse.SUPPRESS,
        help="admin key; safer in $XINGLIN_ADMIN_KEY, which `ps` does not show",
    )
    add(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("XINGLIN_DATA_DIR") or "xinglin-data"),
        help="data directory of the service, whose store has the adapters to copy",
    )
    add("--swaps", type=_count, default=1000, help="number of alias moves")
    add("--streams", type=_count, default=32, help="number of concurrent streams")
    add("--adapters", type=_count, default=3, help="number of adapters to request and swap")
    add("--seconds", type=float, default=15.0, help="seconds to measure before the first swap")
    add("--seed", type=int, default=0, help="random seed")
    add("--json", type=Path, default=argparse.SUPPRESS, help="file to write the figures to")
    command.set_defaults(run=_run)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _run(options: argparse.Namespace) -> int:
    from app.client.storm.storm import run  # noqa: PLC0415 - keeps --help fast

    return run(options)
