"""Stock vLLM with the demo's adapters, and the same requests to it and to a service of ours."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapters import AdapterRef, AdapterStore
from tests.alike.outcome import Outcome, send
from tests.alike.requests import MODELS, Request
from tests.bench.serve.stock import BASE_MODEL, stock_server
from tests.service import Service


def stock_with_adapters(data_dir: Path, *more: str) -> Service:
    """Stock vLLM with `more` options, that has the adapters under the service's names; not started."""
    store = AdapterStore(data_dir / "store")
    modules = [
        f"{name}={store.folder(name, store.get(AdapterRef(name)).revision)}"
        for name in MODELS
        if name != BASE_MODEL
    ]
    server = stock_server(data_dir, *more, "--lora-modules", *modules)
    # As the service does by default.
    server.environment = {**server.environment, "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    return server


def ask_both(
    requests: Iterable[Request], stock: Service, ours: Service
) -> Iterator[tuple[Request, Outcome, Outcome]]:
    """Each server has one request at a time: on CPU, stock answers wrongly where adapters share a batch."""
    with ThreadPoolExecutor(2) as pool:
        for request in requests:
            of_stock, of_ours = pool.map(send, (stock, ours), (request, request))
            yield request, of_stock, of_ours
