"""The client libraries that people use, each with its own packages, against a running service.

A suite is a module of functions `check_*(url)`. All checks of one client run in one process, where the packages of
`requirements/clients/<client>.txt` come before those of the environment.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.served import MAX_CONCURRENT_REQUESTS
from tests.conftest import copy_products
from tests.service import ROOT, Service, free_port

HERE = Path(__file__).parent
OF_OPENAI = ("openai_chat", "openai_wire", "openai_responses")
SUITES = {
    "openai": OF_OPENAI,
    "openai-2": OF_OPENAI,
    "openai-1": ("openai_chat", "openai_wire"),
    "anthropic": ("anthropic_messages",),
    "langchain": ("langchain_chat",),
    "llama-index": ("llama_index_chat",),
}
OF_THE_ENVIRONMENT = ("openai", "anthropic")
"""What vLLM requires anyway."""

Failure = Callable[[str, str], str | None]


def _checks(suite: str) -> list[str]:
    """The names of a suite's checks, read without the packages that it imports."""
    module = ast.parse((HERE / f"{suite}.py").read_text())
    functions = [node.name for node in module.body if isinstance(node, ast.FunctionDef)]
    return [f"{suite}.{name}" for name in functions if name.startswith("check_")]


def _is_here(client: str) -> bool:
    return client in OF_THE_ENVIRONMENT or (ROOT / ".cache" / "clients" / client / ".done").exists()


CHECKS = [
    (client, check)
    for client, suites in SUITES.items()
    if _is_here(client)
    for suite in suites
    for check in _checks(suite)
]
"""Of the clients that are installed: `make test-clients` installs all."""


@pytest.fixture(scope="module")
def service(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that reads tool calls, and takes few requests at once."""
    data_dir = copy_products(demo_dir, tmp_path_factory.mktemp("clients") / "data")
    settings = {
        "XINGLIN_TOOL_CALL_PARSER": "hermes",
        "XINGLIN_MAX_CONCURRENT_REQUESTS": str(MAX_CONCURRENT_REQUESTS),
    }
    service = Service(data_dir, free_port(), settings)
    service.start()
    yield service
    assert service.stop() == 0


@pytest.fixture(scope="module")
def failure(service: Service, request: pytest.FixtureRequest) -> Failure:
    """How a client's check failed. All of the client's checks that were asked for run with the first."""
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if item.path == Path(__file__) and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            client, check = (str(item.callspec.params[name]) for name in ("client", "check"))
            wanted.setdefault(client, []).append(check)
    found: dict[str, dict[str, str | None]] = {}

    def of(client: str, check: str) -> str | None:
        if client not in found:
            found[client] = _run(client, service.url, wanted[client])
        return found[client].get(check, f"it did not come to an end: {found[client]['stderr']}")

    return of


def _run(client: str, url: str, checks: list[str]) -> dict[str, str | None]:
    """The failures of a client's checks by name, and what was written to stderr."""
    environment = {**os.environ}
    if client not in OF_THE_ENVIRONMENT:
        environment["PYTHONPATH"] = str(ROOT / ".cache" / "clients" / client)
    command = [sys.executable, "-W", "error", "-m", "tests.clients.run", url, *checks]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    try:
        output, problems = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        output, problems = process.communicate()
    lines = [json.loads(line) for line in output.splitlines()]
    return {"stderr": problems[-2000:], **{line["check"]: line["failure"] for line in lines}}


@pytest.mark.parametrize(("client", "check"), CHECKS)
def test_client(failure: Failure, client: str, check: str) -> None:
    reason = failure(client, check)
    assert reason is None, reason
