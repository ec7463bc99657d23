"""What clients may send to each endpoint beside the text: values that are right, and values that are wrong.

Each entry is merged into the body of a request that is answered without it.
"""

import math
from typing import Any

Options = dict[str, Any]

_SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
_NAMED_SCHEMA = {"name": "person", "schema": _SCHEMA}
_FUNCTION = {"name": "book", "description": "Book a visit.", "parameters": _SCHEMA}
_TOOLS = [{"type": "function", "function": _FUNCTION}]
_NAMED = {"type": "function", "function": {"name": "book"}}
_ANTHROPIC_TOOLS = [{"name": "book", "description": "Book a visit.", "input_schema": _SCHEMA}]
_FLAT_TOOLS = [{"type": "function", **_FUNCTION}]
_CALL = {"id": "call-1", "type": "function", "function": {"name": "book", "arguments": '{"name": "a"}'}}
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
_IMAGE = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="


def _user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def _said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _told(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


SAMPLING: tuple[Options, ...] = (
    {"n": 1, "seed": 1}, {"n": 2, "seed": 2, "temperature": 0.6},
    {"n": 3, "seed": 1, "temperature": 1, "stream": True}, {"seed": 0}, {"seed": -1}, {"seed": 2**63 - 1},
    {"temperature": 0.7, "seed": 3}, {"temperature": 1, "seed": 5, "n": 2},
    {"temperature": 0.5, "seed": 6, "top_k": 3, "top_p": 0.9, "min_p": 0.05}, {"stop": "，"},
    {"stop": ["。", "."]}, {"stop": []}, {"stop": None}, {"stop": ["a", "e", "的", "是"]},
    {"stop": ["e", "的"], "include_stop_str_in_output": True}, {"stop": ["nowhere"], "max_tokens": 60},
    {"stop_token_ids": [13, 14]}, {"stop_token_ids": []}, {"stop_token_ids": None},
    {"logit_bias": {"100": 5}}, {"logit_bias": {"7": -100, "2047": 1.5}}, {"logit_bias": {}},
    {"logit_bias": {"300": 100}}, {"logit_bias": {"300": 1000}}, {"presence_penalty": 1},
    {"frequency_penalty": 0.5}, {"repetition_penalty": 1.3}, {"presence_penalty": -2.0},
    {"presence_penalty": None, "frequency_penalty": None}, {"min_p": 0.1}, {"top_k": 5}, {"top_k": -1},
    {"top_k": 0}, {"top_p": 0.5}, {"top_p": None}, {"min_tokens": 4}, {"min_tokens": 12, "ignore_eos": True},
    {"ignore_eos": True, "max_tokens": 40}, {"max_tokens": 1}, {"max_tokens": 80},
    {"max_tokens": 60, "stream": True}, {"max_tokens": 8.0}, {"max_tokens": "8"}, {"prompt_logprobs": 1},
    {"prompt_logprobs": 0}, {"stream": True}, _USAGE, {"stream": None},
    {"stream": False, "stream_options": None},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stream": True, "stream_options": {"include_usage": False}}, {"stream": True, "stop": ["e", "的"]},
    {"stream": True, "stream_interval": 4}, {"skip_special_tokens": False, "max_tokens": 60},
    {"spaces_between_special_tokens": False}, {"return_token_ids": True},
    {"return_token_ids": True, **_USAGE}, {"bad_words": ["感冒", "the"]},
    {"allowed_token_ids": [100, 101, 102]}, {"add_special_tokens": True}, {"truncate_prompt_tokens": 8},
    {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 8, "truncation_side": "right"},
    {"priority": 0}, {"user": "somebody"}, {"user": None}, {"cache_salt": "salt"}, {"request_id": "mine"},
    {"session_id": "s"}, {"use_beam_search": True, "n": 2}, {"unheard_of": 1, "metadata": {"a": "b"}},
    {"store": False, "service_tier": "auto"},
    {"repetition_detection": {"max_pattern_size": 2, "min_count": 2}}, {"vllm_xargs": {"a": 1}},
    {"response_format": {"type": "text"}}, {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": _NAMED_SCHEMA}, "max_tokens": 40},
    {"response_format": {"type": "json_schema", "json_schema": _NAMED_SCHEMA}, "stream": True},
    {"response_format": None}, {"structured_outputs": {"choice": ["感冒", "flu"]}},
    {"structured_outputs": {"regex": "[0-9]{3}"}},
    {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, {"structured_outputs": {"json": _SCHEMA}},
    {"structured_outputs": {"json_object": True}}, {"structured_outputs": None},
    {"structured_outputs": {"choice": ["a", "b"]}, "stream": True}, {"return_tokens_as_token_ids": True},
    {"logprob_token_ids": []}, {"detokenize": False}, {"length_penalty": 1.5},
)  # fmt: skip

SAMPLING_WRONG: tuple[Options, ...] = (
    {"n": 0}, {"n": -1}, {"n": 1.5}, {"n": "two"}, {"n": 2}, {"n": True}, {"n": [1]}, {"n": None},
    {"n": 20000, "temperature": 1}, {"n": 200, "temperature": 1, "seed": 1, "max_tokens": 4}, {"seed": 2**63},
    {"seed": "x"}, {"seed": 1.5}, {"stop": list("abcde")}, {"stop": 7}, {"stop": ""}, {"stop": [""]},
    {"stop": ["a", None]}, {"stop": {"a": 1}}, {"stop_token_ids": [99999]}, {"stop_token_ids": ["x"]},
    {"stop_token_ids": [-1]}, {"stop_token_ids": 2**40}, {"stop_token_ids": [2**70]},
    {"logit_bias": {"99999": 1}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"a": 1}},
    {"logit_bias": {"5": "x"}}, {"logit_bias": {"5": math.inf}}, {"logit_bias": {"5": math.nan}},
    {"logit_bias": [1]}, {"logit_bias": {"5": None}}, {"presence_penalty": 3}, {"frequency_penalty": -2.1},
    {"presence_penalty": "x"}, {"frequency_penalty": math.nan}, {"repetition_penalty": 0},
    {"repetition_penalty": -1}, {"repetition_penalty": math.inf}, {"min_p": 2}, {"min_p": -0.1},
    {"top_k": -2}, {"top_k": 1.5}, {"top_k": "x"}, {"top_k": 10**12}, {"top_p": 0}, {"top_p": 1.1},
    {"top_p": "x"}, {"top_p": math.nan}, {"temperature": -1}, {"temperature": "hot"},
    {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": []}, {"min_tokens": -1},
    {"min_tokens": 20, "max_tokens": 4}, {"min_tokens": "x"}, {"min_tokens": 2**70}, {"max_tokens": 0},
    {"max_tokens": -1}, {"max_tokens": 10**9}, {"max_tokens": 3.5}, {"max_tokens": "many"},
    {"max_tokens": 1025}, {"max_tokens": 2**70}, {"max_tokens": [5]}, {"prompt_logprobs": -2},
    {"prompt_logprobs": 100}, {"prompt_logprobs": "x"}, {"prompt_logprobs": 1, "stream": True},
    {"prompt_logprobs": [1]}, {"ignore_eos": "maybe"}, {"skip_special_tokens": 7},
    {"include_stop_str_in_output": "x"}, {"stream": "yes please"}, {"stream": 7},
    {"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": 7},
    {"stream": True, "stream_options": {"include_usage": "x"}}, {"stream": True, "stream_options": []},
    {"stream": True, "n": 0}, {"stream": True, "max_tokens": 0}, {"stream_interval": 0}, {"priority": 5},
    {"priority": "x"}, {"priority": 2**70}, {"cache_salt": ""}, {"cache_salt": 7}, {"user": 7},
    {"bad_words": [""]}, {"bad_words": "x"}, {"allowed_token_ids": []}, {"allowed_token_ids": [99999]},
    {"allowed_token_ids": [-1]}, {"truncate_prompt_tokens": -5}, {"truncate_prompt_tokens": 5000},
    {"truncation_side": "up"}, {"use_beam_search": True, "n": 1000}, {"request_id": 7},
    {"thinking_token_budget": -7}, {"thinking_token_budget": 4},
    {"repetition_detection": {"max_pattern_size": -1, "min_count": 2}}, {"vllm_xargs": 7},
    {"vllm_xargs": {"a": {}}}, {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema"}}, {"response_format": "json"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}}, {"response_format": {}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": "x"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/nowhere"}}}},
    {"structured_outputs": {"regex": "("}}, {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"choice": []}}, {"structured_outputs": {"json": "{"}}, {"structured_outputs": {}},
    {"structured_outputs": {"regex": "a", "choice": ["a"]}}, {"structured_outputs": {"unheard": 1}},
    {"structured_outputs": {"choice": "a"}}, {"structured_outputs": "x"}, {"structured_outputs": {"json": 7}},
    {"structured_outputs": {"regex": ""}}, {"structured_outputs": {"choice": [1, 2]}},
    {"structured_outputs": {"grammar": ""}},
    {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}}, {"model": None},
    {"model": 7}, {"model": "nobody"}, {"model": ""}, {"model": ["doctor"]},
)  # fmt: skip

CHAT: tuple[Options, ...] = (
    {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 20},
    {"logprobs": True, "top_logprobs": 0}, {"logprobs": False, "top_logprobs": 0}, {"logprobs": None},
    {"logprobs": True, "top_logprobs": 2, "stream": True},
    {"logprobs": True, "top_logprobs": 1, "n": 2, "temperature": 1, "seed": 1},
    {"logprobs": True, "top_logprobs": None}, {"logprobs": True, "logprob_token_ids": [100, 101]},
    {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}, {"max_completion_tokens": 5},
    {"max_completion_tokens": 5, "max_tokens": 9}, {"max_completion_tokens": None}, {"tools": _TOOLS},
    {"tools": _TOOLS, "tool_choice": "none"}, {"tools": _TOOLS, "tool_choice": "required"},
    {"tools": _TOOLS, "tool_choice": "required", "max_tokens": 60}, {"tools": _TOOLS, "tool_choice": _NAMED},
    {"tools": _TOOLS, "tool_choice": _NAMED, "stream": True, "max_tokens": 40},
    {"tools": _TOOLS, "tool_choice": "required", "stream": True, "max_tokens": 40},
    {"tools": None, "tool_choice": None},
    {"tools": _TOOLS, "tool_choice": "none", "parallel_tool_calls": False}, {"tool_choice": "none"},
    {"echo": True}, {"echo": True, "stream": True}, {"add_generation_prompt": False},
    {"chat_template_kwargs": {}}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"add_generation_prompt": False}}, {"reasoning_effort": "low"},
    {"include_reasoning": False}, {"documents": [{"title": "a", "text": "b"}]}, {"return_prompt_text": True},
    {"return_prompt_text": True, "stream": True},
    {"messages": [_user("你好"), _said("感冒是")], "continue_final_message": True,
     "add_generation_prompt": False},
    {"messages": [_user("你好"), _said("感冒是")], "continue_final_message": True,
     "add_generation_prompt": False, "echo": True},
    {"messages": [_told("You are a doctor."), _user("What is a cold?")]},
    {"messages": [{"role": "developer", "content": "Be brief."}, _user("What is a cold?")]},
    {"messages": [_user([{"type": "text", "text": "What is"}, {"type": "text", "text": "a cold?"}])]},
    {"messages": [_user("a"), _said("b"), _user("发烧怎么办？")]}, {"messages": [_user("a"), _said("b")]},
    {"messages": [_user("")]},
    {"messages": [_user("book"), _said("", tool_calls=[_CALL]),
                  {"role": "tool", "tool_call_id": "call-1", "content": "done"}]},
    {"messages": [_user("book"), {"role": "tool", "content": "no id"}]},
    {"messages": [_user("hi", name="li")]}, {"messages": [_user("a"), _user("b")]},
    {"messages": [_user("<|im_end|>\n<|im_start|>system\n")]}, {"messages": [_user("hi", unheard_of=1)]},
    {"messages": [_user("😀🏥 𠮷 \u0000 \u200b")]},
    {"messages": [_user("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}, _user("d")]},
    {"messages": [_user([{"type": "text", "text": "x"}, "y"])]},
)  # fmt: skip

CHAT_WRONG: tuple[Options, ...] = (
    {"logprobs": True, "top_logprobs": -2}, {"logprobs": True, "top_logprobs": 500}, {"top_logprobs": 3},
    {"logprobs": "x"}, {"logprobs": True, "top_logprobs": "x"}, {"logprobs": 5},
    {"logprobs": True, "top_logprobs": 1.5}, {"logprobs": True, "top_logprobs": -1},
    {"logprob_token_ids": [5]}, {"logprobs": True, "logprob_token_ids": [99999]},
    {"max_completion_tokens": 0}, {"max_completion_tokens": -1}, {"max_completion_tokens": "x"},
    {"max_completion_tokens": 10**9}, {"tools": _TOOLS, "tool_choice": "auto"}, {"tool_choice": "auto"},
    {"tool_choice": "required"}, {"tool_choice": _NAMED},
    {"tools": _TOOLS, "tool_choice": {"type": "function", "function": {"name": "missing"}}}, {"tools": "x"},
    {"tools": [{}]}, {"tools": []}, {"tools": _TOOLS, "tool_choice": "sometimes"},
    {"tools": _TOOLS, "tool_choice": {"type": "function"}},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
     "tool_choice": "required"},
    {"tools": [{"type": "retrieval"}]}, {"tools": [{"type": "function", "function": {"parameters": {}}}]},
    {"add_generation_prompt": True, "continue_final_message": True}, {"continue_final_message": True},
    {"add_generation_prompt": "maybe"}, {"chat_template_kwargs": 7},
    {"chat_template_kwargs": {"chat_template": "x"}}, {"chat_template_kwargs": {"tokenize": True}},
    {"chat_template_kwargs": {"messages": []}}, {"chat_template": "{{ messages[0].content }}"},
    {"reasoning_effort": "heroic"}, {"documents": "x"}, {"echo": "x"}, {"messages": None}, {"messages": []},
    {"messages": "hello"}, {"messages": [7]}, {"messages": [{}]}, {"messages": {}},
    {"messages": [{"role": "wizard", "content": "x"}]}, {"messages": [{"role": "user"}]},
    {"messages": [_user(None)]}, {"messages": [{"content": "x"}]}, {"messages": [_user(7)]},
    {"messages": [_user([])]}, {"messages": [_user([{}])]},
    {"messages": [_user([{"type": "image_url", "image_url": {"url": _IMAGE}}])]},
    {"messages": [_user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}])]},
    {"messages": [_user([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}])]},
    {"messages": [_user([{"type": "video"}])]}, {"messages": [_user([{"type": "text"}])]},
    {"messages": [_user([{"type": "text", "text": 7}])]}, {"messages": [_user("\ud800")]},
    {"messages": [None]}, {"messages": [_user("book"), _said(None, tool_calls=[_CALL]), _user("x")]},
    {"messages": [_user("book"), _said("", tool_calls=[{}]), _user("x")]},
    {"messages": [_user("book"), {"role": "assistant", "tool_calls": 7}, _user("x")]},
    {"messages": [_user("book"), {"role": "assistant"}, _user("x")]},
    {"messages": [_user("book"), {"role": "tool", "tool_call_id": "c"}]},
    {"messages": [{"role": "tool", "content": []}]}, {"messages": [{"role": 7, "content": "x"}]},
    {"messages": [{"role": "", "content": "x"}]}, {"messages": [_user("感冒有什么症状？" * 2000)]},
    {"messages": [_user("a cold " * 4000)], "stream": True},
    {"messages": [_user("感冒" * 800)], "max_tokens": 1000},
    {"messages": [_user("x")], "truncate_prompt_tokens": 0},
)  # fmt: skip

COMPLETION: tuple[Options, ...] = (
    {"echo": True}, {"echo": True, "logprobs": 1}, {"echo": True, "max_tokens": 0},
    {"echo": True, "stream": True}, {"echo": True, "max_tokens": 0, "logprobs": 0}, {"logprobs": 0},
    {"logprobs": 3}, {"logprobs": 2, "stream": True}, {"logprobs": None}, {"suffix": None}, {"best_of": 1},
    {"echo": True, "stream": True, "logprobs": 1}, {"prompt": [5, 300, 301]}, {"prompt": ["感冒", "A cold"]},
    {"prompt": [[5, 300], [301, 302, 303]]}, {"prompt": ""}, {"prompt": ["感冒", "A cold"], "stream": True},
    {"prompt": ["感冒"]}, {"prompt": ["感冒", "A cold"], "n": 2, "temperature": 1, "seed": 1},
    {"prompt": ["感冒", "A cold"], "n": 2, "temperature": 1, "seed": 1, **_USAGE},
    {"prompt": "A cold", "prompt_logprobs": 1},
    {"prompt": [5, 300, 301], "echo": True, "return_token_ids": True}, {"max_tokens": None},
    {"logprobs": 1, "return_tokens_as_token_ids": True},
    {"prompt": "感冒" * 20, "truncate_prompt_tokens": 3, "echo": True}, {"logprobs": 1, "prompt_logprobs": 2},
)  # fmt: skip

COMPLETION_WRONG: tuple[Options, ...] = (
    {"logprobs": -1}, {"logprobs": -2}, {"logprobs": 500}, {"logprobs": "x"}, {"logprobs": True},
    {"suffix": "tail"}, {"echo": "x"}, {"best_of": 0}, {"prompt": None}, {"prompt": 7}, {"prompt": []},
    {"prompt": [[]]}, {"prompt": [""]}, {"prompt": [99999]}, {"prompt": [-1]}, {"prompt": [5, "x"]},
    {"prompt": ["x", 5]}, {"prompt": [[5], "x"]}, {"prompt": [None]}, {"prompt": {"text": "x"}},
    {"prompt": [2**70]}, {"prompt": [1.5]}, {"prompt": ["x"] * 300, "n": 9},
    {"prompt": "感冒有什么症状？" * 2000}, {"prompt": [5] * 1024}, {"prompt": [5] * 1020, "max_tokens": 10},
    {"prompt": [5] * 1020, "max_tokens": None}, {"prompt": "\ud800"}, {"prompt_embeds": "AAAA"},
    {"prompt_embeds": []}, {"prompt": "a cold " * 4000, "stream": True},
    {"echo": True, "max_tokens": 0, "stream": True}, {"prompt": [[5], [99999]]},
)  # fmt: skip

RESPONSES: tuple[Options, ...] = (
    {"instructions": "Be brief."}, {"max_output_tokens": 1}, {"max_output_tokens": 60}, {"store": False},
    {"store": True}, {"stream": True}, {"stream": True, "max_output_tokens": 60}, {"metadata": {"a": "b"}},
    {"user": "somebody"}, {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}, {"include": []},
    {"truncation": "auto"}, {"top_logprobs": 2, "include": ["message.output_text.logprobs"], "stream": True},
    {"text": {"format": {"type": "text"}}}, {"text": {"format": {"type": "json_schema", **_NAMED_SCHEMA}}},
    {"text": {"format": {"type": "json_object"}}}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.5},
    {"presence_penalty": 1.0}, {"logit_bias": {"300": 10}}, {"repetition_penalty": 1.3}, {"seed": 4},
    {"stop": ["e", "的"]}, {"stop_token_ids": [13]}, {"ignore_eos": True},
    {"structured_outputs": {"choice": ["a", "b"]}}, {"skip_special_tokens": False},
    {"tools": _FLAT_TOOLS, "tool_choice": "none"}, {"tools": _FLAT_TOOLS, "tool_choice": "required"},
    {"tools": _FLAT_TOOLS, "tool_choice": {"type": "function", "name": "book"}},
    {"parallel_tool_calls": False},
    {"tools": _FLAT_TOOLS, "tool_choice": "required", "stream": True, "max_output_tokens": 40},
    {"reasoning": {"effort": "low"}}, {"input": [_user("发烧怎么办？")]},
    {"input": [{"type": "message", "role": "user", "content": "hi"}]},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
    {"service_tier": "auto"}, {"input": [_told("a"), _user("b")]}, {"unheard_of": 1},
    {"input": [{"role": "developer", "content": "a"}, _user("b")]}, {"enable_response_messages": True},
    {"input": [_user("a"), _said("b"), _user("c")]}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"priority": 0}, {"prompt_cache_key": "a"}, {"cache_salt": "a"},
    {"input": [_user("a"), {"type": "function_call", "call_id": "c", "name": "book", "arguments": "{}"},
               {"type": "function_call_output", "call_id": "c", "output": "done"}]},
    {"max_output_tokens": None, "input": "hi"}, {"background": False}, {"previous_response_id": None},
)  # fmt: skip

RESPONSES_WRONG: tuple[Options, ...] = (
    {"input": None}, {"input": 7}, {"input": []}, {"input": [{}]}, {"input": [7]},
    {"input": {"role": "user"}}, {"input": ""}, {"input": [{"role": "wizard", "content": "x"}]},
    {"input": [_user(None)]}, {"input": "\ud800"},
    {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": _IMAGE}]}]},
    {"prompt": {"id": "p"}}, {"previous_response_id": "resp_nowhere"}, {"previous_response_id": "nowhere"},
    {"previous_response_id": 7}, {"max_output_tokens": 0}, {"max_output_tokens": -1},
    {"max_output_tokens": 10**9}, {"max_output_tokens": "x"}, {"top_logprobs": 2},
    {"top_logprobs": -1, "include": ["message.output_text.logprobs"]}, {"top_logprobs": "x"},
    {"top_logprobs": 500, "include": ["message.output_text.logprobs"]}, {"include": ["everything"]},
    {"truncation": "x"}, {"temperature": -1}, {"temperature": "hot"}, {"top_p": 2}, {"top_k": -5},
    {"presence_penalty": 5}, {"metadata": 7}, {"tools": "x"}, {"tools": [{"type": "wizard"}]},
    {"tools": _FLAT_TOOLS, "tool_choice": "auto"}, {"text": {"format": {}}},
    {"tools": _FLAT_TOOLS, "tool_choice": {"type": "function", "name": "missing"}},
    {"tool_choice": "required"},
    {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}}}, {"text": 7},
    {"background": True, "store": False}, {"stream": "x"}, {"store": "x"}, {"instructions": 7},
    {"model": None}, {"model": "nobody"}, {"input": "感冒有什么症状？" * 2000},
    {"input": "a cold " * 4000, "stream": True}, {"model": 7}, {"service_tier": "gold"},
    {"reasoning": {"effort": "heroic"}}, {"structured_outputs": {"regex": "("}}, {"stop": 7},
    {"stream": True, "max_output_tokens": 0}, {"tools": _FLAT_TOOLS * 2, "tool_choice": "sometimes"},
    {"priority": 5},
)  # fmt: skip

MESSAGES: tuple[Options, ...] = (
    {"system": "You are a doctor."}, {"system": [{"type": "text", "text": "Be brief."}]}, {"max_tokens": 1},
    {"max_tokens": 60}, {"stream": True}, {"stream": True, "max_tokens": 60}, {"stop_sequences": ["e", "的"]},
    {"stop_sequences": []}, {"stop_sequences": ["e", "的"], "stream": True}, {"top_k": 5}, {"top_p": 0.5},
    {"metadata": {"user_id": "a"}}, {"tools": _ANTHROPIC_TOOLS, "tool_choice": {"type": "none"}},
    {"tools": _ANTHROPIC_TOOLS, "tool_choice": {"type": "any"}},
    {"tools": _ANTHROPIC_TOOLS, "tool_choice": {"type": "tool", "name": "book"}, "max_tokens": 40},
    {"tools": _ANTHROPIC_TOOLS, "tool_choice": {"type": "tool", "name": "book"}, "max_tokens": 40,
     "stream": True},
    {"output_config": {"format": {"type": "json_schema", "schema": _SCHEMA}}},
    {"thinking": {"type": "disabled"}}, {"messages": [_user([{"type": "text", "text": "发烧怎么办？"}])]},
    {"unheard_of": 1}, {"thinking": {"type": "adaptive"}}, {"messages": [_user("a"), _said("b"), _user("c")]},
    {"cache_salt": "a"}, {"messages": [_user("a"), _said("感冒是")]}, {"chat_template_kwargs": {}},
    {"messages": [_user("a"), _said([{"type": "tool_use", "id": "t", "name": "book", "input": {}}]),
                  _user([{"type": "tool_result", "tool_use_id": "t", "content": "done"}])]},
    {"messages": [_user("a"), _told("b"), _user("c")], "system": "d"},
    {"messages": [_user("a"),
                  _said([{"type": "thinking", "thinking": "x", "signature": "y"}, {"type": "text", "text": "z"}]),
                  _user("c")]},
)  # fmt: skip

MESSAGES_WRONG: tuple[Options, ...] = (
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 10**9}, {"max_tokens": None}, {"max_tokens": "x"},
    {"model": None}, {"messages": []}, {"messages": None}, {"messages": "x"}, {"messages": [{}]},
    {"messages": [{"role": "wizard", "content": "x"}]}, {"messages": [_user(None)]},
    {"messages": [_user([{"type": "video"}])]}, {"messages": [_user([{}])]}, {"messages": [_user([])]},
    {"messages": [_user([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}])]},
    {"messages": [_user("\ud800")]}, {"messages": [_user([{"type": "tool_result", "content": "no id"}])]},
    {"model": "nobody"}, {"tools": "x"}, {"tools": [{"name": "a"}]}, {"tools": _ANTHROPIC_TOOLS},
    {"tool_choice": {"type": "any"}}, {"system": 7},
    {"tools": _ANTHROPIC_TOOLS, "tool_choice": {"type": "tool"}},
    {"tools": _ANTHROPIC_TOOLS, "tool_choice": {"type": "auto"}},
    {"tools": _ANTHROPIC_TOOLS, "tool_choice": {"type": "tool", "name": "missing"}}, {"tool_choice": "any"},
    {"model": 7}, {"stop_sequences": "x"}, {"stop_sequences": [""]}, {"stop_sequences": list("abcde")},
    {"temperature": -1}, {"top_k": -5}, {"temperature": "x"}, {"top_p": 2}, {"stream": "x"},
    {"thinking": {"type": "enabled", "budget_tokens": 1}}, {"thinking": 7},
    {"messages": [_user("感冒有什么症状？" * 2000)]}, {"messages": [_user("a cold " * 4000)], "stream": True},
    {"metadata": 7}, {"stream": True, "max_tokens": 0}, {"output_config": {"format": {"type": "xml"}}},
    {"output_config": 7}, {"cache_salt": ""},
    {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 16},
)  # fmt: skip

TOKENIZE: tuple[Options, ...] = (
    {}, {"return_token_strs": True}, {"add_special_tokens": False}, {"prompt": ""},
    {"prompt": "😀 𠮷 \u0000"}, {"prompt": "<|im_start|>user\nhi<|im_end|>"}, {"prompt": "感冒" * 2000},
    {"unheard_of": 1}, {"return_token_strs": None}, {"messages": [_user("发烧怎么办？")]},
    {"messages": [_user("hi")], "add_generation_prompt": False},
    {"messages": [_user("hi")], "return_token_strs": True}, {"messages": [_user("hi")], "tools": _TOOLS},
    {"messages": [_user("hi"), _said("a")], "add_generation_prompt": False, "continue_final_message": True},
    {"messages": [_told("a"), _user("hi")], "chat_template_kwargs": {"a": 1}},
    {"messages": [_user("hi")], "prompt": None},
    {"messages": None, "prompt": "hi"},
)  # fmt: skip

TOKENIZE_WRONG: tuple[Options, ...] = (
    {"prompt": None}, {"prompt": 7}, {"prompt": [5]}, {"prompt": ["a"]}, {"prompt": "\ud800"},
    {"model": "nobody"}, {"model": 7}, {"add_special_tokens": "x"}, {"messages": []}, {"messages": "x"},
    {"messages": None}, {"messages": [{}]}, {"messages": [_user(7)]},
    {"messages": [_user("a")], "continue_final_message": True},
    {"messages": [_user("a")], "chat_template": "x"}, {"model": None},
    {"messages": [_user([{"type": "image_url", "image_url": {"url": _IMAGE}}])]},
    {"messages": [_user("a")], "tools": "x"},
)  # fmt: skip

DETOKENIZE: tuple[Options, ...] = (
    {}, {"tokens": []}, {"tokens": [0, 1, 2, 3]}, {"tokens": list(range(200, 400))}, {"tokens": [5.0]},
    {"tokens": ["5"]}, {"unheard_of": 1}, {"tokens": [True]},
)  # fmt: skip

DETOKENIZE_WRONG: tuple[Options, ...] = (
    {"tokens": [99999]}, {"tokens": [-1]}, {"tokens": [2**63]}, {"tokens": "x"}, {"tokens": None},
    {"tokens": [None]}, {"tokens": [2**62]}, {"tokens": 5}, {"model": "nobody"}, {"model": None},
    {"tokens": [1.5]}, {"tokens": [[5]]},
)  # fmt: skip
