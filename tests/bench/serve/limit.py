"""What HTTP costs: this service against its own engine without it, in turns, with 64 streams of the base model.

    python -m tests.bench.serve.limit [--rounds 5] [--out limit.json] [--quick]

The engine without HTTP is vLLM's AsyncLLM in this process, built by the service's own code with the service's settings,
worker extension included: it turns tokens into text, and hands each on by itself, as it does within the service. Both
run at the same time, one idle while the other works. The ratio is tokens/s, service / engine: 1 would be a front end
that takes nothing. On a machine of few cores the service's clients take their part of it, too.
"""

import asyncio
import gc
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import uvloop

from app.__main__ import _prepare_process
from app.settings import Settings
from tests.bench.serve.load import QUESTIONS, TOKENS
from tests.bench.serve.sides import (
    Side,
    arguments,
    keep,
    measured,
    our_side,
    ratios,
    running,
    wait_until_quiet,
)
from tests.bench.serve.stock import BASE_MODEL
from tests.conftest import copy_products

STREAMS = 64
Rates = dict[str, list[float]]
"""Tokens a second of each round, with and without HTTP."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--answers", type=int, default=4, help="of each stream in a round, one after another")
    options = parser.parse_args()
    rounds, answers = (2, 1) if options.quick else (options.rounds, options.answers)
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = copy_products(options.data_dir, Path(scratch, "data"))
        service = our_side(data_dir)
        with running(service):
            rates = uvloop.run(_in_turns(data_dir, service, rounds, answers))
    keep(options.out, rates)
    print(f"tokens/s, service / engine: {ratios(rates['service'], rates['engine'])}")


async def _in_turns(data_dir: Path, service: Side, rounds: int, answers: int) -> Rates:
    settings = Settings.model_validate({"data_dir": data_dir})
    _prepare_process(settings)
    # After the environment is prepared: it imports vLLM.
    from app.engine.build import build_engine  # noqa: PLC0415
    from app.main import _engine_options  # noqa: PLC0415

    engine: Any = await build_engine(_engine_options(settings, *settings.bases()))
    try:
        gc.collect()
        gc.freeze()  # as the service does
        prompts = [await engine.render([{"role": "user", "content": text}], None) for text in QUESTIONS]
        await _engine_rate(engine, prompts, 1)  # what happens only once is not measured
        rates: Rates = {"service": [], "engine": []}
        for number in range(1, rounds + 1):
            for side in ("service", "engine") if number % 2 else ("engine", "service"):
                if side == "service":
                    rate = await asyncio.to_thread(_service_rate, service, answers)
                else:
                    await asyncio.to_thread(wait_until_quiet, [service])
                    rate = await _engine_rate(engine, prompts, answers)
                rates[side].append(rate)
                print(f"round {number}, {side}: {rate:.0f} tokens/s", flush=True)
    finally:
        await engine.close()
    return rates


def _service_rate(service: Side, answers: int) -> float:
    seen = measured(service, [service], [BASE_MODEL], STREAMS, STREAMS * answers).load
    if seen.failed:
        raise SystemExit(f"{seen.failed} answers failed: {seen.failures}")
    return seen.tokens_per_second


async def _engine_rate(engine: Any, prompts: list[list[int]], answers: int) -> float:
    """Tokens a second of as many streams as the service has, each asking again when its answer has ended."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.inputs.engine import tokens_input  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    left, tokens = iter(range(STREAMS * answers)), 0

    async def stream() -> None:
        nonlocal tokens
        for number in left:
            parameters = SamplingParams(
                temperature=0, max_tokens=TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA
            )
            prompt = tokens_input(prompts[number % len(prompts)])
            async for output in engine._llm.generate(prompt, parameters, uuid.uuid4().hex):
                tokens += len(output.outputs[0].token_ids)

    began = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(STREAMS)))
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
