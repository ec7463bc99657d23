"""vLLM behind the Engine protocol. Only app.engine uses vLLM's symbols: this module, the other modules `vllm*`,
fast_stream, worker and cpu_worker.

vLLM's entry points are not a public API and move with every release. The engine is embedded (AsyncLLM) with vLLM's own
OpenAI serving classes, which have every feature of its server. Three rules keep the engine alive:

- every load gives an adapter a new id, and an adapter that failed to load is removed again;
- a request never names an adapter that is not resident, since a failed load inside a step kills the engine;
- vLLM's own eviction never happens, since its limits are above ours.
"""

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import vllm.envs
import vllm.v1.engine.utils
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.renderers.hf import HfRenderer, resolve_chat_template
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from adapters import BaseModelFacts, fingerprint
from app import errors
from app.engine import launch
from app.engine.base import (
    Answer,
    Endpoint,
    Events,
    LoadedAdapter,
    Observer,
    Parameters,
    TokenScore,
    Unobserved,
)
from app.engine.build import EngineOptions
from app.engine.stats import EngineStats
from app.engine.stops import resolved
from app.engine.template import Template, Templates
from app.engine.vllm_arguments import engine_config, folder_of
from app.engine.vllm_endpoints import Endpoints, parameters
from app.engine.vllm_errors import api_error, translated, unavailable
from app.engine.vllm_outputs import FastOutputProcessor
from app.engine.vllm_serving import Asked, is_short, rendering_with

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WATCH_SECONDS = 0.25


class VllmEngine:
    """One base model on vLLM. `build` it in a thread, `start` it on the event loop."""

    facts: BaseModelFacts

    def __init__(self, llm: AsyncLLM, options: EngineOptions, folder: Path) -> None:
        self._llm = llm
        self._options = options
        self._folder = folder
        self._adapter_ids = itertools.count(1)
        self._request_ids = itertools.count(1)
        self.dtype = str(llm.model_config.dtype).removeprefix("torch.")
        self.max_model_len = int(llm.model_config.max_model_len)
        self._templates = Templates()
        self._own_templates: dict[int, tuple[Template, OnlineRenderer]] = {}
        """By engine id, for adapters whose template differs from the base model's."""
        self._endpoints = Endpoints(
            llm,
            options.name,
            tool_call_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
            stored_responses=options.stored_responses,
            truncates=options.truncates,
            always_usage=options.always_usage,
            tokens_as_ids=options.return_tokens_as_token_ids,
            parses_text=options.control_tokens == "tokens",
        )

    @classmethod
    def build(cls, options: EngineOptions) -> "VllmEngine":
        """Start the engine's processes and load the base model. Blocks for 5 to 50 seconds.

        Raises ValueError if the model cannot be served.
        """
        if current_platform.is_cpu():
            launch.prepare()
            vllm.v1.engine.utils.get_mp_context = launch.context
        folder = folder_of(options.model)
        llm = _AsyncLLM.from_vllm_config(engine_config(options, folder), disable_log_stats=False)
        return cls(llm, options, folder)

    async def start(self) -> None:
        """Get the module shapes from the worker, and run code whose first use would stall all requests."""
        (shapes, *_) = await self._llm.collective_rpc("xinglin_module_shapes")
        self.facts = BaseModelFacts(
            name=self._options.name,
            fingerprint=await asyncio.to_thread(fingerprint, self._folder),
            module_shapes={name: tuple(shape) for name, shape in shapes.items()},
            max_lora_rank=self._options.max_lora_rank,
        )
        vllm.envs.enable_envs_cache()
        self._endpoints.renderer.warmup()
        renderers = (self._endpoints.renderer, self._endpoints.quick_renderer)
        for renderer in renderers:
            renderer.chat_template = "{{ messages[0].content }}"  # the base model may have none
        await self._warm_up()
        for renderer in renderers:
            renderer.chat_template = None

    async def _warm_up(self) -> None:
        """Compile sampling and grammar code before the first request."""
        ask = {"messages": [{"role": "user", "content": "warm-up"}], "max_tokens": 2}
        schema = {"type": "object", "properties": {"a": {"type": "string"}}}
        for extra in (
            {"temperature": 0, "logprobs": True, "top_logprobs": 1},
            {"temperature": 1, "top_k": 5, "top_p": 0.9},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
        ):
            request_id = f"warm-up-{next(self._request_ids)}"
            body = {**ask, **extra, "model": self.facts.name}
            await self.answer(
                Endpoint.CHAT,
                body,
                request_id=request_id,
                adapter=None,
                fingerprint="",
                observer=Unobserved(),
            )
        await self.score([0], [0], None)

    @property
    def is_dead(self) -> bool:
        """Whether the engine core has ended; it cannot be restarted."""
        return bool(self._llm.errored)

    @property
    def stalled_seconds(self) -> float:
        """See Engine.stalled_seconds."""
        processor = self._llm.output_processor
        return processor.stalled_seconds if isinstance(processor, FastOutputProcessor) else 0.0

    @property
    def stats(self) -> EngineStats:
        """See Engine.stats."""
        processor = self._llm.output_processor
        return processor.stats() if isinstance(processor, FastOutputProcessor) else EngineStats()

    async def load(
        self,
        name: str,
        folder: Path,
        *,
        template: str | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> LoadedAdapter:
        """See Engine.load."""
        tokenizer = self._llm.renderer.tokenizer
        known = tokenizer.get_added_vocab() if tokenizer else {}
        stops = resolved(name, stop, stop_token_ids, known, self._llm.model_config.get_vocab_size())
        adapter = LoadedAdapter(name, next(self._adapter_ids), folder, template, *stops)
        await self._open_template(adapter)
        try:
            await self._unless_dead(self._llm.add_lora(_lora_request(adapter)))
        except errors.EngineUnavailable:
            raise
        except Exception as error:  # vLLM has no error type for bad adapters
            logger.exception("the engine refused %s", name)
            # Remove a half-written adapter that vLLM may have registered under the id.
            await self.remove(adapter)
            raise errors.AdapterRefused(f"the engine could not load {name}: see the service's log") from error
        return adapter

    async def remove(self, adapter: LoadedAdapter) -> None:
        """See Engine.remove."""
        if own := self._own_templates.pop(adapter.engine_id, None):
            await self._templates.close(own[0])
        await self._unless_dead(self._llm.remove_lora(adapter.engine_id))

    async def _open_template(self, adapter: LoadedAdapter) -> None:
        """Compile the adapter's chat template, if it has its own. Raises AdapterRefused."""
        renderer = self._llm.renderer
        if adapter.template is None:
            return
        if not isinstance(renderer, HfRenderer):
            raise errors.AdapterRefused(
                "this base model builds its prompts in code, not from a template: train the adapter with that code, "
                "and publish it without chat_template.jinja"
            )
        of_base = resolve_chat_template(renderer.tokenizer, None, None, model_config=self._llm.model_config)
        if adapter.template == of_base:
            return  # trainers often leave a copy
        try:
            template = await self._templates.open(adapter.template)
        except errors.BadRequest as error:
            raise errors.AdapterRefused(f"{adapter.name} is refused: {error}") from error
        self._own_templates[adapter.engine_id] = (
            template,
            rendering_with(self._endpoints.renderer, template),
        )

    def _renderer(self, adapter: LoadedAdapter | None, *, is_short: bool = False) -> OnlineRenderer:
        own = self._own_templates.get(adapter.engine_id) if adapter else None
        if own:
            return own[1]
        return self._endpoints.quick_renderer if is_short else self._endpoints.renderer

    async def resident(self) -> set[int]:
        """See Engine.resident."""
        held = await self._unless_dead(self._llm.collective_rpc("xinglin_resident"))
        return {engine_id for of_one_worker in held for engine_id in of_one_worker}

    async def _unless_dead(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a utility call, also if the engine dies: vLLM then never answers the pending ones."""
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=_WATCH_SECONDS))[0]:
                if self.is_dead:
                    raise unavailable()
            return task.result()
        except EngineDeadError as error:
            raise unavailable() from error
        finally:
            task.cancel()

    async def score(
        self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], adapter: LoadedAdapter | None
    ) -> list[TokenScore]:
        """See Engine.score."""
        given = [*prompt_token_ids, *token_ids]
        # prompt_logprobs=1 gives the logprobs of the given token and of the best one. The generated token is not used.
        parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
        output = await self._generate(given, parameters, adapter)
        scores = output.prompt_logprobs[len(prompt_token_ids) :]
        return [
            TokenScore(score[token].logprob, max(entry.logprob for entry in score.values()))
            for score, token in zip(scores, token_ids, strict=True)
        ]

    async def greedy(
        self, prompt_token_ids: Sequence[int], adapter: LoadedAdapter | None, max_tokens: int
    ) -> list[int]:
        """See Engine.greedy."""
        parameters = SamplingParams(max_tokens=max_tokens, temperature=0, detokenize=False)
        parameters.stop_token_ids = list(adapter.stop_token_ids) if adapter else []
        output = await self._generate(list(prompt_token_ids), parameters, adapter)
        return list(output.outputs[0].token_ids)

    async def _generate(
        self, prompt_token_ids: list[int], parameters: SamplingParams, adapter: LoadedAdapter | None
    ) -> RequestOutput:
        parameters.output_kind = RequestOutputKind.FINAL_ONLY
        lora = None if adapter is None else _lora_request(adapter)
        request_id = f"own-{next(self._request_ids)}"
        prompt = tokens_input(prompt_token_ids)
        try:
            (output,) = [
                o async for o in self._llm.generate(prompt, parameters, request_id, lora_request=lora)
            ]
        except Exception as error:  # vLLM raises its own and built-in errors alike
            raise translated(error, is_dead=self.is_dead) from error
        return output

    async def render(self, messages: Sequence[Mapping[str, Any]], adapter: LoadedAdapter | None) -> list[int]:
        """See Engine.render."""
        try:
            request = ChatCompletionRequest(model=self.facts.name, messages=list(messages))
            rendered = await self._renderer(adapter).render_chat(request)
        except errors.ApiError:
            raise
        except Exception as error:  # as in score
            raise translated(error, is_dead=self.is_dead) from error
        if isinstance(rendered, ErrorResponse):
            raise api_error(rendered)
        _, (prompt,) = rendered
        return list(prompt["prompt_token_ids"])

    async def tokenizer_info(self) -> dict[str, Any]:
        """See Engine.tokenizer_info."""
        info = await self._endpoints.tokenization.get_tokenizer_info()
        told = dict(info.model_dump())
        template = resolve_chat_template(
            self._llm.renderer.tokenizer, None, None, model_config=self._llm.model_config
        )
        if template:
            told["chat_template"] = template
        return {name: value for name, value in told.items() if not _is_path(value)}

    def parameters(self) -> Parameters:
        """See Engine.parameters."""
        return parameters()

    async def answer(
        self,
        endpoint: Endpoint,
        body: Mapping[str, Any],
        *,
        request_id: str,
        adapter: LoadedAdapter | None,
        fingerprint: str,
        observer: Observer,
    ) -> Answer:
        """See Engine.answer."""
        asked = Asked(
            id=request_id,
            model=str(body["model"]),
            lora=None if adapter is None else _lora_request(adapter),
            renderer=self._renderer(adapter, is_short=is_short(body)),
            has_own_template=adapter is not None and adapter.engine_id in self._own_templates,
            stop=(*adapter.stop, *adapter.stop_token_ids) if adapter else (),
            fingerprint=fingerprint,
            observer=observer,
        )
        return await self._endpoints.answer(endpoint, body, asked)

    async def retrieve(
        self, response_id: str, *, stream: bool, starting_after: int | None
    ) -> dict[str, Any] | Events:
        """See Engine.retrieve."""
        return await self._endpoints.responses.retrieve(
            response_id, stream=stream, starting_after=starting_after
        )

    async def cancel(self, response_id: str) -> dict[str, Any]:
        """See Engine.cancel."""
        return await self._endpoints.responses.cancel(response_id)

    async def delete(self, response_id: str) -> None:
        """See Engine.delete."""
        await self._endpoints.responses.delete(response_id)

    async def close(self) -> None:
        """See Engine.close."""
        await self._templates.close_all()
        self._llm.output_processor.propagate_error(
            EngineDeadError()
        )  # wakes pending requests, which get no more output
        await asyncio.to_thread(self._llm.shutdown)


class _AsyncLLM(AsyncLLM):
    def _run_output_handler(self) -> None:
        """Replace vLLM's output processor; called before the first request, or by the constructor inside a loop."""
        if self.output_handler is None:
            self.output_processor = FastOutputProcessor(
                self.renderer.tokenizer,
                log_stats=True,  # records the arrival time of requests
                stream_interval=self.vllm_config.scheduler_config.stream_interval,
                adapter_slots=self.vllm_config.lora_config.max_loras - 1,  # one is reserved for proofs
            )
            self.log_stats = False  # turns off vLLM's statistics per token
            self.logger_manager = self.output_processor
        super()._run_output_handler()

    async def add_request(self, request_id: str, *arguments: Any, **options: Any) -> Any:
        """See vLLM's, which lets a request continue if its client disconnects during this call."""
        try:
            return await super().add_request(request_id, *arguments, **options)
        except asyncio.CancelledError:
            await self.abort(request_id)
            raise

    def __del__(self) -> None:
        """Do nothing: VllmEngine.close shuts down, and vLLM's finalizer fails at interpreter exit."""


def _is_path(value: object) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def _lora_request(adapter: LoadedAdapter) -> LoRARequest:
    # The prefix cache is keyed by name and path, which are new for every revision.
    return LoRARequest(adapter.name, adapter.engine_id, str(adapter.folder))
