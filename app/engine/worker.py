"""Runs inside every vLLM worker: what the service must know that only the worker can say."""

import multiprocessing
import os
import signal
import threading

from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA


def die_with_parent() -> None:
    """End this process when the one that started it ends, even by SIGKILL.

    Waits on multiprocessing's own pipe rather than PR_SET_PDEATHSIG, which fires when the *thread* that
    started the process ends, and engines are built in threads.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="die-with-parent", daemon=True).start()


class WorkerExtension:
    """Mixed into vLLM's worker class; called by `collective_rpc`. Names must not clash with vLLM's."""

    def xinglin_module_shapes(self) -> dict[str, tuple[int, int]]:
        """Every LoRA-capable linear module, packed ones by their parts, to (in_features, out_features)."""
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        shapes: dict[str, tuple[int, int]] = {}
        for name, module in manager.modules.items():
            if isinstance(module, BaseLinearLayerWithLoRA):
                width = module.lora_a_stacked[0].shape[-1]
                heights = [b.shape[-2] for b in module.lora_b_stacked]
                parts = manager.packed_modules.get(name)
                if parts:
                    shapes |= {part: (width, height) for part, height in zip(parts, heights, strict=True)}
                else:
                    shapes[name] = (width, sum(heights))
        return shapes

    def xinglin_resident(self) -> list[int]:
        """The ids of all adapters registered or in a slot."""
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        slots = {slot for slot in manager.lora_index_to_id if slot is not None}
        return sorted(slots | set(manager._registered_adapters.cache))


die_with_parent()
# Ctrl-C in a terminal reaches every process of the group: the service lets running streams end first, and
# then ends its engine by SIGTERM.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
