"""The worker extension with vLLM's own `add_lora_linear` restored."""

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_stock = PunicaWrapperCPU.add_lora_linear

from app.engine.cpu_worker import WorkerExtension  # noqa: E402 - the import applies the repair

PunicaWrapperCPU.add_lora_linear = _stock

__all__ = ["WorkerExtension"]
