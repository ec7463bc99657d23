"""All vLLM symbols that the product uses: an upgrade that moves one fails here first."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent

CHECK = textwrap.dedent(
    """
    import importlib.util
    import inspect
    import os
    import sys
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm.version import __version__
    assert __version__.startswith("0.32."), __version__

    from app.engine import (
        cpu_worker, fast_stream, launch, vllm as door, vllm_arguments, vllm_endpoints as endpoints, vllm_errors,
        vllm_outputs as outputs, vllm_plain_text, vllm_responses, vllm_serving as serving, worker,
    )
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
    from vllm.v1.worker.worker_base import WorkerBase

    def has(owner, name, *parameters):
        found = inspect.signature(getattr(owner, name)).parameters
        missing = [p for p in parameters if p not in found]
        assert not missing, f"{owner.__name__}.{name} lacks {missing}"

    has(door.AsyncLLM, "from_vllm_config", "vllm_config", "disable_log_stats")
    has(door.AsyncLLM, "generate", "prompt", "sampling_params", "request_id", "lora_request")
    for name in ("add_lora", "remove_lora", "collective_rpc", "shutdown"):
        has(door.AsyncLLM, name)
    assert isinstance(door.AsyncLLM.errored, property)
    # Each request is served by a copy of one of these, with its own models, renderer, engine and request id.
    for kind, method in (
        (serving.OpenAIServingChat, "create_chat_completion"),
        (serving.OpenAIServingCompletion, "create_completion"),
        (serving.AnthropicServingMessages, "create_messages"),
        (serving.AnthropicServingMessages, "count_tokens"),
        (vllm_responses.OpenAIServingResponses, "create_responses"),
        (serving.ServingTokenization, "create_tokenize"),
        (serving.ServingTokenization, "create_detokenize"),
    ):
        has(kind, method, "request", "raw_request")
        source = inspect.getsource(sys.modules[kind.__module__])
        assert "self.online_renderer." in source and "self.engine_client = " not in source
    for kind in (serving.OpenAIServingChat, serving.OpenAIServingCompletion, vllm_responses.OpenAIServingResponses):
        has(kind, "create_streaming_error_response", "message", "err_type", "status_code", "param")
        assert "self.engine_client.generate(" in inspect.getsource(sys.modules[kind.__module__])
    for kind in (serving.OpenAIServingChat, serving.OpenAIServingCompletion, serving.ServingTokenization):
        assert "self._base_request_id(" in inspect.getsource(sys.modules[kind.__module__])
    # The fast stream replaces vLLM's output queue and its stream generator for chat.
    has(serving.OpenAIServingChat, "chat_completion_stream_generator", "request", "result_generator", "request_id",
        "model_name")
    has(fast_stream.AsyncLLM, "add_request", "request_id", "prompt", "params", "lora_request")
    has(fast_stream.AsyncLLM, "abort", "request_id", "internal")
    source = inspect.getsource(fast_stream.AsyncLLM.add_request)
    assert source.index("self._run_output_handler()") < source.index("RequestOutputCollector(")
    has(outputs.OutputProcessor, "process_outputs", "engine_core_outputs")
    has(outputs.OutputProcessor, "_finish_request", "req_state")
    assert "req_state.queue.put(" in inspect.getsource(outputs.OutputProcessor)
    assert {"is_prefilling", "detokenizer", "queue", "prompt_len"} <= {
        *fast_stream.RequestState.__init__.__code__.co_names
    }
    assert fast_stream._shapes().delta[0] == '[{"index":0,"delta":{"content":', fast_stream._shapes()
    detokenizers = inspect.getsource(inspect.getmodule(fast_stream.RequestState).IncrementalDetokenizer)
    assert "self.token_ids: list[int]" in detokenizers
    # Short prompts are rendered directly.
    has(serving.hf.BaseRenderer, "render_chat", "conversations", "chat_params", "tok_params")
    parameters = [inspect.signature(getattr(serving.hf.BaseRenderer, f"render_chat{of}")) for of in ("", "_async")]
    assert parameters[0].parameters.keys() == parameters[1].parameters.keys()
    assert "tokenizer = copy.copy(tokenizer)" in inspect.getsource(serving.hf.HfRenderer.__init__)
    has(serving, "cached_tokenizer_from_config", "model_config")
    has(serving.hf.BaseRenderer, "get_eos_token_id")
    assert "_merge_inline_system" in inspect.getsource(serving.AnthropicServingMessages)
    responses = inspect.getsource(vllm_responses.OpenAIServingResponses)
    for name in ("response_store", "msg_store", "event_store", "background_tasks", "enable_store"):
        assert f"self.{name}" in responses, name
    for name in ("_run_background_request", "_run_background_request_stream", "responses_background_stream_generator"):
        assert f"self.{name}(" in responses, name
    has(serving.OpenAIServingModels, "is_base_model", "model_name")
    has(serving.OpenAIServingModels, "model_name", "lora_request")
    has(door.OnlineRenderer, "render_chat", "request")
    has(door.OnlineRenderer, "warmup")
    # An adapter's chat template is rendered in another process: vLLM's renderer is copied, and one step replaced.
    assert "self.chat_template" in inspect.getsource(door.OnlineRenderer.render_chat)
    assert "await renderer.render_chat_async" in inspect.getsource(door.OnlineRenderer.preprocess_chat)
    assert "self._apply_chat_template_async(" in inspect.getsource(serving.hf.HfRenderer.render_messages_async)
    assert "self.online_renderer.render_chat(" in inspect.getsource(serving.OpenAIServingChat.render_chat_request)
    for name in ("_detect_developer_role_support", "_convert_developer_to_system", "_consolidate_system_messages"):
        has(serving.hf, name)
    assert issubclass(vllm_errors.ChatTemplateResolutionError, ValueError)
    has(door, "resolve_chat_template", "tokenizer", "chat_template", "tools", "model_config")
    assert door.LoRARequest.__struct_fields__[:3] == ("lora_name", "lora_int_id", "lora_path")
    assert "request_id" in endpoints.ResponsesRequest.model_fields
    has(vllm_arguments.AsyncEngineArgs, "__init__", "enable_lora", "max_lora_rank", "max_loras", "max_cpu_loras",
        "worker_extension_cls", "disable_log_stats", "gpu_memory_utilization", "served_model_name", "reasoning_parser")
    # Control tokens in texts: the renderer's class is replaced, and its bound method is bound again.
    renderer = vllm_plain_text.HfRenderer
    for name in ("render_messages", "render_messages_async"):
        has(renderer, name, "messages", "params")
    for name in ("_tokenize_prompt", "_wants_offsets"):
        has(renderer, name, "prompt", "params")
    has(renderer, "_build_tokens_prompt", "token_ids", "prompt", "offset_mapping")
    source = inspect.getsource(vllm_plain_text.BaseRenderer.__init__)
    assert "self._tokenize_prompt_async = make_async(" in source
    assert str(serving.GenerationError()) == "Internal server error"
    has(door.vllm.envs, "enable_envs_cache")
    # On CPU, engines are forked from our fork server.
    assert "context = get_mp_context()" in inspect.getsource(door.vllm.v1.engine.utils.CoreEngineProcManager)
    assert all(importlib.util.find_spec(name) for name in launch.IMPORTED)
    # The repair on CPU replaces these; the parameters are those that the layers pass.
    assert PunicaWrapperCPU.add_lora_linear is cpu_worker._add_lora_linear
    assert PunicaWrapperCPU.add_lora_embedding is PunicaWrapperCPU.add_lora_logits is cpu_worker._add_nothing
    has(PunicaWrapperBase, "add_lora_logits", "y", "x")
    has(PunicaWrapperBase, "add_lora_embedding", "y", "x")
    has(PunicaWrapperBase, "add_lora_linear", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices")
    assert isinstance(PunicaWrapperBase.token_lora_indices, property)
    # The worker extension is a mixin: its names must not exist in the worker.
    assert not [n for n in vars(worker.WorkerExtension) if not n.startswith("__") and hasattr(WorkerBase, n)]
    source = inspect.getsource(LoRAModelManager) + inspect.getsource(LRUCacheLoRAModelManager)
    for name in ("packed_modules", "modules", "lora_index_to_id", "_registered_adapters"):
        assert f"self.{name}" in source, name
    print("all there")
    """
)


def test_every_symbol_is_there() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.stdout.strip().endswith("all there"), result.stderr[-3000:]
