"""vLLM's chat renderer, changed so that control tokens in the text of messages stay text."""

from dataclasses import replace
from typing import Any

from vllm.renderers.base import BaseRenderer
from vllm.renderers.hf import HfRenderer
from vllm.utils.async_utils import make_async

from adapters.plain_text import Piece, PlainText


def let_text_be_text(renderer: BaseRenderer[Any]) -> None:
    """Make a renderer, and later copies of it, keep text from being read as control tokens.

    Renderers that build prompts in code, not from a template, already do so.
    """
    if isinstance(renderer, HfRenderer):
        ours: Any = renderer
        ours.__class__ = _Renderer
        ours.plain_text = PlainText(renderer.get_tokenizer())
        ours._tokenize_prompt_async = make_async(ours._tokenize_prompt, executor=ours._executor)


class _Guarded(str):
    """A rendered text with stand-ins. Other texts are tokenized as in vLLM, without a search for stand-ins."""

    __slots__ = ()


class _Renderer(HfRenderer):
    plain_text: PlainText

    def render_messages(self, messages: Any, params: Any) -> Any:
        messages, params, is_guarded = self._guarded(messages, params)
        rendered = super().render_messages(messages, params)
        return self._marked(*rendered) if is_guarded else rendered

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        messages, params, is_guarded = self._guarded(messages, params)
        rendered = await super().render_messages_async(messages, params)
        return self._marked(*rendered) if is_guarded else rendered

    def _guarded(self, messages: Any, params: Any) -> tuple[Any, Any, bool]:
        given = params.chat_template_kwargs
        texts, variables = self.plain_text.guarded(messages), self.plain_text.guarded(given)
        if variables is not given:
            params = replace(params, chat_template_kwargs=variables)
        return texts, params, texts is not messages or variables is not given

    def _marked(self, conversation: Any, prompt: Any) -> tuple[Any, Any]:
        if isinstance(text := prompt.get("prompt"), str):
            prompt["prompt"] = _Guarded(text)
        return self.plain_text.restored(conversation), prompt

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        text = prompt["prompt"]
        if not isinstance(text, _Guarded):
            return super()._tokenize_prompt(prompt, params)
        tokenizer, wants_offsets = self.get_tokenizer(), self._wants_offsets(prompt, params)
        adds_special = params.get_encode_kwargs().get("add_special_tokens", False)

        def tokenize(piece: str) -> Piece:
            nonlocal adds_special
            found = tokenizer(piece, add_special_tokens=adds_special, return_offsets_mapping=wants_offsets)
            adds_special = False  # only at the beginning
            return found["input_ids"], found.get("offset_mapping", [])

        token_ids, places = self.plain_text.tokens(text, tokenize)
        prompt = {**prompt, "prompt": self.plain_text.restored(str(text))}
        return self._build_tokens_prompt(token_ids, prompt, offset_mapping=places if wants_offsets else None)
