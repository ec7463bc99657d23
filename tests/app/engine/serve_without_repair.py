"""Run the service with vLLM's own LoRA code on CPU, to show that the repair is needed."""

import sys
from typing import Any

import app.engine.vllm_arguments
import app.lifecycle.loader
from app.__main__ import main
from app.lifecycle.evidence import Evidence
from app.lifecycle.proof import Proof


async def _no_proof(*_: Any) -> Proof:
    """Skip the proof, which would refuse every adapter."""
    nothing = Evidence(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return Proof(prompts=0, evidence=nothing, most_telling=0, still_right=0.0)


if __name__ == "__main__":  # the engine's processes import this module too
    app.engine.vllm_arguments.CPU_WORKER_EXTENSION = "tests.app.engine.stock_worker.WorkerExtension"
    app.lifecycle.loader.prove = _no_proof
    sys.exit(main(["serve"]))
