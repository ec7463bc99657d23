"""Command line of training: python -m training run | resume | demo | list | show | ..."""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from adapters import AdapterError
from training import commands
from training.config import load_config
from training.demo.build import build_demo
from training.errors import ConfigError, TrainingError
from training.runs import processes, progress
from training.runs.events import (
    EVENTS_FILE,
    Cancelled,
    Checkpoint,
    Evaluation,
    Event,
    Failed,
    Progress,
    Published,
    Resumed,
    Started,
    Stopped,
    Succeeded,
    read_events,
)
from training.runs.execute import begin, carry_out, is_running
from training.runs.pipeline import is_pipeline, run_pipeline
from training.runs.stop import EXIT_CODE
from training.runs.stop import Stopped as RunStopped

_EXAMPLES = """\
examples:
  python -m training demo                               train the demo's base model and adapters
  python -m training run training/configs/sft.yaml      train an adapter and publish it
  python -m training run pipeline.yaml                  run several jobs; later ones use the results of earlier ones
  python -m training resume 20260102-030405-doctor-1a2b resume a run that was killed or stopped
  python -m training preview training/configs/sft.yaml  show the training tokens of a job
  python -m training list                               list all runs, newest last
  python -m training show 20260102-030405-doctor-1a2b   show the events of one run
  tensorboard --logdir xinglin-data/runs                loss curves

A config is one YAML file; start from a commented example in training/configs/.

exit codes:
  0    done
  1    the run failed
  2    the command or the config is wrong
  75   stopped at a checkpoint after SIGTERM or Ctrl-C
  130  interrupted before the first checkpoint, or by a second Ctrl-C
After 1, 75, 130 or a kill, `resume` continues the run from its last checkpoint. To continue a pipeline, run it again.
"""


def main() -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args()
    progress.show_lines(logging.INFO if processes.leads() else logging.ERROR)
    # Both signals must raise KeyboardInterrupt: shells start background jobs with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        arguments.command(arguments)
    except TrainingError as error:
        _say(str(error))
        return error.exit_code
    except RunStopped as stopped:
        _say(f"stopped at {stopped}")
        return EXIT_CODE
    except KeyboardInterrupt:
        _say("interrupted: `python -m training list` shows the runs that can be resumed")
        return 130
    except AdapterError as error:
        _say(str(error))
        return 1
    except Exception as error:  # the traceback is in the run's events
        _say(f"failed: {type(error).__name__}: {error}")
        return 1
    return 0


def _say(message: str) -> None:
    process = "" if processes.count() == 1 else f"process {processes.number()}: "
    print(f"{process}{message}", file=sys.stderr)


def _run(arguments: argparse.Namespace) -> None:
    if is_pipeline(arguments.config):
        if processes.count() > 1:
            raise ConfigError(f"{arguments.config}: is a pipeline: launch its jobs one by one, in order")
        for ref in run_pipeline(arguments.config, arguments.data_dir):
            print(f"made {ref}")
        return
    run_id = begin(load_config(arguments.config), arguments.data_dir)
    _carry_out(run_id, arguments.data_dir)


def _resume(arguments: argparse.Namespace) -> None:
    _carry_out(arguments.run, arguments.data_dir, accept_changes=arguments.accept_changes)


def _carry_out(run_id: str, data_dir: Path, *, accept_changes: bool = False) -> None:
    try:
        published = carry_out(run_id, data_dir, accept_changes=accept_changes)
    except RunStopped as stopped:
        raise RunStopped(f"{stopped}: continue with `python -m training resume {run_id}`") from None
    if not processes.leads():
        return
    alias = f", and {published.ref.split('@')[0]}@{published.alias} points at it" if published.alias else ""
    print(f"published {published.ref}{alias}")


def _demo(arguments: argparse.Namespace) -> None:
    build_demo(arguments.data_dir)


def _list(arguments: argparse.Namespace) -> None:
    for folder in sorted(path for path in (arguments.data_dir / "runs").glob("*") if path.is_dir()):
        events = read_events(folder / EVENTS_FILE) if (folder / EVENTS_FILE).exists() else []
        published = [event.ref for event in events if isinstance(event, Published)]
        print(f"{folder.name:44} {_state(folder, events):32} {' '.join(published[-1:])}".rstrip())


def _show(arguments: argparse.Namespace) -> None:
    path = arguments.data_dir / "runs" / arguments.run / EVENTS_FILE
    if not path.is_file():
        raise ConfigError(
            f"no run {arguments.run} in {arguments.data_dir}; `python -m training list` shows all runs"
        )
    print(path.parent)
    for event in read_events(path):
        print(f"{event.at:%H:%M:%S}  {_line(event)}")


def _state(folder: Path, events: list[Event]) -> str:
    last = events[-1] if events else None
    if isinstance(last, Succeeded | Failed | Cancelled | Stopped):
        return last.event
    if last is None:
        return "not started"
    step = next(
        (f", step {e.step} of {e.max_steps}" for e in reversed(events) if isinstance(e, Progress)), ""
    )
    return ("running" if is_running(folder) else "killed") + step


def _line(event: Event) -> str:
    match event:
        case Resumed() | Stopped():
            facts = f" at step {event.step}"
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
        description="Train adapters and publish them for serving.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("XINGLIN_DATA_DIR", "xinglin-data")),
        help="folder of runs, models and the adapter store (default: $XINGLIN_DATA_DIR or xinglin-data)",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    run = subparsers.add_parser(
        "run",
        parents=[shared],
        help="run a job or a pipeline, and publish the result",
        description="Run a job or a pipeline, and publish the result. Ctrl-C or SIGTERM stops it at a checkpoint, with "
        "exit code 75. Continue a run with `resume`, and a pipeline by running it again.",
    )
    run.add_argument(
        "config",
        type=Path,
        metavar="CONFIG.yaml",
        help="a job, as in training/configs/, or a pipeline: `pipeline: NAME` and `jobs: [...]`",
    )
    run.set_defaults(command=_run)

    resume = subparsers.add_parser("resume", parents=[shared], help="continue a run from its last checkpoint")
    resume.add_argument("run", metavar="RUN", help="a run id from `list`")
    resume.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue even if data files, adapters, the base model, reward functions or settings have changed since "
        "the run began; the manifest lists the changes",
    )
    resume.set_defaults(command=_resume)

    demo = subparsers.add_parser(
        "demo", parents=[shared], help="train the models of the demo that are missing or outdated"
    )
    demo.set_defaults(command=_demo)

    list_ = subparsers.add_parser("list", parents=[shared], help="list all runs")
    list_.set_defaults(command=_list)

    show = subparsers.add_parser("show", parents=[shared], help="show the events of one run")
    show.add_argument("run", metavar="RUN", help="a run id from `list`")
    show.set_defaults(command=_show)
    commands.add_to(subparsers, shared)
    return parser


if __name__ == "__main__":
    sys.exit(main())
