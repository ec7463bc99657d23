"""What vLLM is told to build an engine from our options."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from app.engine.build import EngineOptions

CPU_WORKER_EXTENSION = "app.engine.cpu_worker.WorkerExtension"
CUDA_WORKER_EXTENSION = "app.engine.worker.WorkerExtension"

_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_HEAD_DIMS_ON_CPU = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}


def folder_of(model: str) -> Path:
    """The folder of a base model, which is fetched if `model` is a hub's name. Raises ValueError if there is none."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if model.startswith(("/", ".")):
        raise ValueError(f"there is no base model folder {folder.name}: set XINGLIN_MODEL to one that exists")
    return Path(snapshot_download(model, allow_patterns=_MODEL_FILES))


def engine_config(options: EngineOptions, folder: Path) -> VllmConfig:
    """vLLM's configuration for the base model in `folder`. Raises ValueError when the model cannot be served."""
    on_cpu = current_platform.is_cpu()
    arguments = AsyncEngineArgs(
        model=str(folder),
        served_model_name=[options.name],
        dtype=_saved_dtype(folder) if on_cpu and options.dtype == "auto" else options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_memory_bytes=options.kv_cache_gib * 2**30 if on_cpu else None,
        enable_lora=True,
        max_lora_rank=options.max_lora_rank,
        # One more, so that a revision under proof finds room while max_loras others are busy.
        max_loras=options.max_loras + 1,
        # One more than we ever hold: what vLLM evicts by itself, it would read from disk inside a step.
        max_cpu_loras=max(options.max_resident, options.max_loras) + 1,
        worker_extension_cls=CPU_WORKER_EXTENSION if on_cpu else CUDA_WORKER_EXTENSION,
        max_logprobs=options.max_logprobs,
        disable_log_stats=True,
        # The engine itself has to know, so that a grammar begins where the thinking ends.
        reasoning_parser=options.reasoning_parser or "",
    )
    config = arguments.create_engine_config()
    head_dim = config.model_config.get_head_size()
    if on_cpu and head_dim not in _HEAD_DIMS_ON_CPU:
        # vLLM finds out at the first request, and dies of it.
        raise ValueError(
            f"head_dim {head_dim} of {options.name} has no CPU attention kernel: a base model for CPU needs "
            f"one of {sorted(_HEAD_DIMS_ON_CPU)}"
        )
    return config


def _saved_dtype(folder: Path) -> str:
    """What the model was saved in. vLLM's own "auto" would round float32 to bfloat16, which no CPU needs."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")
