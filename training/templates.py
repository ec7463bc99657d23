"""Chat templates, and what they let a stage learn from. Training and serving render with the same template."""

from typing import Any

# ChatML. `{% generation %}` marks what the assistant says, so that the loss can be taken on that alone; the
# stop token is inside, or the model would never learn to stop.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}"
    "{{- message.content + '<|im_end|>' }}"
    "{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def prompt_completion(row: dict[str, Any]) -> dict[str, Any]:
    """A `messages` row split before its last answer.

    For base models whose template has no generation marks: the loss is then on the last answer alone.
    """
    messages = row["messages"]
    return {"prompt": messages[:-1], "completion": messages[-1:]}
