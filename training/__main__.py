"""The engineer's way to training: python -m training run | demo | list | show"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from training.config import ConfigError, load_config
from training.data import DataError
from training.demo.build import build_demo
from training.events import (
    EVENTS_FILE,
    Cancelled,
    Checkpoint,
    Evaluation,
    Event,
    Failed,
    Progress,
    Published,
    Started,
    Succeeded,
    read_events,
)
from training.job import run_job

_EXAMPLES = """\
examples:
  python -m training demo                               a base model and two adapters from the bundled corpus
  python -m training run training/configs/sft.yaml      train an adapter and publish it
  python -m training list                               all runs, newest last
  python -m training show 20260102-030405-doctor-1a2b   one run, event by event
  tensorboard --logdir xinglin-data/runs                loss curves

A config is one commented YAML file; take training/configs/*.yaml as a start. Exit codes: 0 done,
1 the run failed, 2 the command or the config is wrong, 130 interrupted.
"""


def main() -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("training").setLevel(logging.INFO)
    # A run that is told to stop says so in its events; a shell that starts it in the background has SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        arguments.command(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: what was under way is not published; run the same command to begin it again",
            file=sys.stderr,
        )
        return 130
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:  # the traceback is in the run's events
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    published = run_job(load_config(arguments.config), arguments.data_dir)
    alias = f", and {published.ref.split('@')[0]}@{published.alias} points at it" if published.alias else ""
    print(f"published {published.ref}{alias}")


def _demo(arguments: argparse.Namespace) -> None:
    build_demo(arguments.data_dir)


def _list(arguments: argparse.Namespace) -> None:
    for path in sorted((arguments.data_dir / "runs").glob(f"*/{EVENTS_FILE}")):
        events = read_events(path)
        published = [event.ref for event in events if isinstance(event, Published)]
        print(f"{path.parent.name:44} {_state(events):32} {' '.join(published)}")


def _show(arguments: argparse.Namespace) -> None:
    path = arguments.data_dir / "runs" / arguments.run / EVENTS_FILE
    if not path.is_file():
        raise ConfigError(
            f"there is no run {arguments.run} in {arguments.data_dir}; see `python -m training list`"
        )
    print(path.parent)
    for event in read_events(path):
        print(f"{event.at:%H:%M:%S}  {_line(event)}")


def _state(events: list[Event]) -> str:
    last = events[-1] if events else None
    if isinstance(last, Succeeded | Failed | Cancelled):
        return last.event
    step = next(
        (f", step {e.step} of {e.max_steps}" for e in reversed(events) if isinstance(e, Progress)), ""
    )
    return f"running or killed{step}"


def _line(event: Event) -> str:
    match event:
        case Started():
            facts = f" {event.name} (stage {event.stage})"
        case Progress():
            facts = f" step {event.step} of {event.max_steps}  {_numbers(event.metrics)}"
        case Evaluation():
            facts = f" at step {event.step}  {_numbers(event.metrics)}"
        case Checkpoint():
            facts = f" {event.folder}"
        case Published():
            facts = f" {event.ref}" + (f", alias {event.alias}" if event.alias else "")
        case Failed():
            facts = f": {event.error}\n{event.traceback}"
        case Succeeded() | Cancelled():
            facts = ""
    return event.event + facts


def _numbers(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train adapters and publish them, ready to be served.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("XINGLIN_DATA_DIR", "xinglin-data")),
        help="where runs, models and the adapter store are (default: $XINGLIN_DATA_DIR or xinglin-data)",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", parents=[shared], help="run a job and publish what it makes")
    run.add_argument("config", type=Path, metavar="CONFIG.yaml")
    run.set_defaults(command=_run)

    demo = commands.add_parser(
        "demo", parents=[shared], help="make the demo's models; does only what is missing"
    )
    demo.set_defaults(command=_demo)

    list_ = commands.add_parser("list", parents=[shared], help="list all runs")
    list_.set_defaults(command=_list)

    show = commands.add_parser("show", parents=[shared], help="show one run, event by event")
    show.add_argument("run", metavar="RUN", help="a run id, as `list` gives it")
    show.set_defaults(command=_show)
    return parser


if __name__ == "__main__":
    sys.exit(main())
