"""Golden prompts: answers and scores of base model and adapter, which an engine must reproduce.

Each prompt runs alone, without padding, so that no other row of a batch changes a number. Answers are scored
teacher-forced: one forward pass over prompt and answer together, as the engine does it.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch

from adapters import GoldenPrompt, Rounding
from training.data import Row
from training.errors import DataError
from training.tokens.loss_mask import MaskError, encode_prompt


def prompts_of(rows: Sequence[Row]) -> list[Row]:
    """Return the prompts of any rows as chats with an empty answer."""
    return [{"messages": [*row["prompt"], {"role": "assistant", "content": ""}]} for row in rows]


def provable(rows: Sequence[Row], tokenizer: Any, positions: int | None, max_new_tokens: int) -> list[Row]:
    """Return the chats whose question and an answer of `max_new_tokens` fit into the model's `positions`.

    A server could not replay the others. Raises DataError if none is left.
    """

    def fits(row: Row) -> bool:
        try:
            prompt = encode_prompt(tokenizer, row["messages"][:-1])
        except MaskError:  # the template refuses this question without its answer
            return False
        return positions is None or len(prompt) + max_new_tokens < positions

    found = [row for row in rows if fits(row)]
    if not found:
        raise DataError(
            f"none of {len(rows)} rows can be a golden prompt, which a server needs to prove the adapter: with "
            f"golden.max_new_tokens {max_new_tokens}, no question fits into the base model's {positions} positions: "
            "lower golden.max_new_tokens, or add rows with short questions"
        )
    return found


def golden_prompts(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    count: int,
    max_new_tokens: int,
    *,
    stops: Collection[int],
) -> list[GoldenPrompt]:
    """Take at most `count` different prompts evenly from `rows`, and add the adapter's greedy answers and scores.

    `model` is a PeftModel with the adapter enabled; `rows` are `messages` rows; an answer ends with one of `stops`,
    or after `max_new_tokens`. Log-probabilities are natural, computed in float32 from the logits of the model in
    its own dtype.
    """
    prompts = {repr(row["messages"][:-1]): row["messages"][:-1] for row in rows}
    distinct = list(prompts.values())
    chosen = (
        [distinct[at * len(distinct) // count] for at in range(count)] if len(distinct) > count else distinct
    )
    model.eval()
    return [_golden_prompt(model, tokenizer, messages, max_new_tokens, stops) for messages in chosen]


@torch.inference_mode()
def rounding(model: Any, golden: Sequence[GoldenPrompt]) -> Rounding | None:
    """Measure how far rounding moves the scores of golden prompts; a server tells rounding from wrong weights by it.

    A float32 model is scored in bfloat16; a bfloat16 model in float16, which rounds to an eighth of that. The weights
    stay in the new dtype: call this last. Returns None if the numbers are not finite, as for a model whose values
    exceed float16.
    """
    dtype = torch.bfloat16 if model.dtype == torch.float32 else torch.float16
    for weight in model.parameters():  # not the buffers: rotary positions are in float32 everywhere
        weight.data = weight.data.to(dtype)
    moved = _mean_difference(model, golden, [prompt.logprobs for prompt in golden])
    with model.disable_adapter():
        moved_base = _mean_difference(model, golden, [prompt.base_logprobs for prompt in golden])
    if not math.isfinite(moved + moved_base):
        return None
    return Rounding(base=moved_base, adapter=moved)


def _mean_difference(model: Any, golden: Sequence[GoldenPrompt], before: Sequence[list[float]]) -> float:
    differences = [
        abs(score - old)
        for prompt, scores in zip(golden, before, strict=True)
        for score, old in zip(_score(model, prompt.prompt_token_ids, prompt.token_ids), scores, strict=True)
    ]
    return sum(differences) / len(differences)


@torch.inference_mode()
def _golden_prompt(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int, stops: Collection[int]
) -> GoldenPrompt:
    prompt = encode_prompt(tokenizer, messages)
    answer = _greedy(model, prompt, max_new_tokens, stops)
    logprobs = _score(model, prompt, answer)
    with model.disable_adapter():
        base_logprobs = _score(model, prompt, answer)
    return GoldenPrompt(
        messages=messages,
        prompt_token_ids=prompt,
        token_ids=answer,
        logprobs=logprobs,
        base_logprobs=base_logprobs,
    )


def _greedy(model: Any, prompt: list[int], max_new_tokens: int, stops: Collection[int]) -> list[int]:
    """Decode the most likely tokens up to and including a stop token.

    `generate` would apply the penalties and biases of the base model's generation_config.json.
    """
    answer: list[int] = []
    given, cache = prompt, None
    while len(answer) < max_new_tokens and not (answer and answer[-1] in stops):
        out = model(
            input_ids=torch.tensor([given], device=model.device), past_key_values=cache, use_cache=True
        )
        answer.append(int(out.logits[0, -1].argmax()))
        given, cache = answer[-1:], out.past_key_values
    return answer


def _score(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Return the log-probability of each token of `answer` after `prompt`."""
    tokens = torch.tensor([prompt + answer], device=model.device)
    logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
    scores = torch.log_softmax(logits, dim=-1)
    return scores.gather(1, tokens[0, len(prompt) :, None])[:, 0].tolist()
