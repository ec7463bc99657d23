"""python -m app serve | swap-storm: run the service, or test a running one under load."""

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

import uvicorn
from pydantic import ValidationError

from adapters.wording import in_words
from app.access.keys import stored_admin_key
from app.client import storm
from app.engine import launch
from app.fetch import checked_prefixes
from app.fetch.guard import parse_networks
from app.settings import Settings

EXIT_CANNOT_START = 1
EXIT_BAD_SETTINGS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _serve(options: argparse.Namespace) -> int:
    given = {
        name: value
        for name, value in vars(options).items()
        if value is not None and name in Settings.model_fields
    }
    try:
        settings = Settings(**given)
        settings.bases()
        checked_prefixes(settings.sources)
        parse_networks(settings.private_networks)
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            of = f"setting {name} (XINGLIN_{name.upper()})" if name else "settings"
            print(f"{of}: {in_words(problem)}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_SETTINGS
    return serve(settings, show_admin_key=options.show_admin_key)


def serve(settings: Settings, *, show_admin_key: bool) -> int:
    """Serve until a signal arrives and return the exit code, which is not 0 if no engine could start."""
    if settings.model is None and settings.base_models is None and not settings.demo_base.exists():
        print("the demo base model does not exist yet: run `python -m training demo`, or name a model with --model",
              file=sys.stderr)  # fmt: skip
        return EXIT_BAD_SETTINGS
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        print(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; change XINGLIN_HOST or "
            "XINGLIN_PORT",
            file=sys.stderr,
        )
        return EXIT_CANNOT_START
    _prepare_process(settings)
    # Imported late, so that --help and wrong settings respond at once.
    from app.banner import banner  # noqa: PLC0415
    from app.main import create_app  # noqa: PLC0415

    key = settings.admin_key.get_secret_value() if settings.admin_key else stored_admin_key(settings.data_dir)
    exit_code = 0

    def give_up() -> None:
        nonlocal exit_code
        exit_code = EXIT_CANNOT_START
        server.should_exit = True

    app = create_app(
        settings,
        on_ready=lambda served: print(banner(settings, served, key if show_admin_key else None), flush=True),
        on_give_up=give_up,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="uvloop",
            http="httptools",
            access_log=False,
            log_config=None,
            timeout_keep_alive=settings.keep_alive_seconds,
            # Running streams may finish, within a limit.
            timeout_graceful_shutdown=20,
        )
    )
    print(
        f"Xinglin is starting on http://{settings.host}:{settings.port}; /readyz shows when it is ready",
        flush=True,
    )
    # After a graceful stop, uvicorn raises the signal again for the handlers it replaced.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    return exit_code


def _prepare_process(settings: Settings) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    is_quiet = settings.log_level != "debug"
    if is_quiet:
        # Hide the libraries' informational messages, but not their errors.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        logging.getLogger("vllm").setLevel(logging.ERROR)
    prepare_environment(is_quiet=is_quiet)
    os.environ.setdefault("VLLM_CACHE_ROOT", str(settings.data_dir.absolute() / "cache" / "vllm"))
    if launch.is_cpu_build():
        launch.prepare()


def prepare_environment(*, is_quiet: bool) -> None:
    """Set the environment variables that torch and vLLM read once, at first import."""
    if is_quiet:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_LOGS", "-torch")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    # Leave one core to this process: with more threads than cores the engine crawls.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
    # Idle threads sleep. Spinning ones would take cores from threads that have work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", "128")  # OpenAI's own limit for `n`
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # The fork server imports torch and vLLM too; without compiled files that takes three times as long.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if launch.is_cpu_build():
        os.environ.update(launch.ENVIRONMENT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m app", description="Serve Xinglin adapters, or test a running service."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "serve",
        help="serve a base model and its adapters over an OpenAI-compatible API",
        description="Serve a base model and its adapters. Every setting is also an environment variable; options "
        "given here override it. docs/en/settings.md lists all settings.",
        epilog="example: python -m app serve --model Qwen/Qwen3-8B --max-lora-rank 64",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, field in Settings.model_fields.items():
        if name in ("admin_key", "publish_roots", "sources", "private_networks"):
            continue  # other users can see secrets on a command line; lists are clearer in the environment
        flag = "--" + name.replace("_", "-")
        text = f"{field.description} [XINGLIN_{name.upper()}]"
        if field.annotation is bool:
            command.add_argument(flag, action="store_true", default=None, help=text)
        else:
            command.add_argument(flag, metavar=name.upper(), help=text)
    command.add_argument("--show-admin-key", action="store_true", help="print the admin key in the banner")
    command.set_defaults(run=_serve)
    storm.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
