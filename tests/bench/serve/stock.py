"""Stock vLLM as a server, with the engine settings that the service has by default."""

import time
import urllib.request
from pathlib import Path

from tests.service import Service, free_port

BASE_MODEL = "xinglin-demo"
_START_SECONDS = 180
# What app.engine.vllm makes of the service's default settings.
_ENGINE = (
    "--served-model-name", BASE_MODEL, "--dtype", "float32", "--max-num-seqs", "64", "--enable-lora",
    "--max-lora-rank", "16", "--max-loras", "5", "--max-cpu-loras", "33", "--disable-log-stats",
)  # fmt: skip
_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


def stock_server(data_dir: Path, *more: str) -> Service:
    """A server on the demo's base model, with `more` options; not started."""
    base, port = data_dir / "models" / BASE_MODEL, free_port()
    command = ("-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port))
    return Service(data_dir, port, _ENVIRONMENT, (*command, *_ENGINE, *more))


def wait_for_health(server: Service) -> None:
    """Return when it answers. Raises TimeoutError."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log[-4000:]
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(server.log[-4000:])
