"""Run the service with vLLM's own LoRA on CPU, to show that the repair is what makes it right."""

import sys
from typing import Any

import app.engine.vllm
import app.reconciler
from app.__main__ import main


async def _no_proof(*_: Any) -> str:
    """A proof would notice, and nothing would be served."""
    return "not asked for"


if __name__ == "__main__":  # the engine's processes import this module too
    app.engine.vllm.CPU_WORKER_EXTENSION = "tests.app.engine.stock_worker.WorkerExtension"
    app.reconciler.prove = _no_proof
    sys.exit(main(["serve"]))
