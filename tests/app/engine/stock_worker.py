"""The worker extension with vLLM's own product of adapters and rows put back."""

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_stock = PunicaWrapperCPU.add_lora_linear

from app.engine.cpu_worker import WorkerExtension  # noqa: E402 - it repairs when imported

PunicaWrapperCPU.add_lora_linear = _stock

__all__ = ["WorkerExtension"]
