"""The tiny base model with other end and padding tokens, as base models of the field have them."""

import json
from pathlib import Path
from shutil import copytree
from typing import Any

END_OF_TEXT, IM_END = "<|endoftext|>", "<|im_end|>"
IDS = {END_OF_TEXT: 0, IM_END: 2}
OUTSIDE = "[PAD]"
"""A padding token whose id is the first past the embeddings."""


def base(
    tiny: Path,
    folder: Path,
    *,
    of_tokenizer: str,
    of_generation: str | None,
    template: str,
    padding: str | None = END_OF_TEXT,
) -> Path:
    """A copy of `tiny` whose tokenizer ends with `of_tokenizer` and fills up with `padding`, if it has any.

    `of_generation` is the end token in its other files; None: they name none, and generation_config.json is missing.
    """
    copytree(tiny, folder)
    change(folder / "tokenizer_config.json", eos_token=of_tokenizer, pad_token=padding)
    change(folder / "config.json", eos_token_id=None if of_generation is None else IDS[of_generation])
    if of_generation is None:
        (folder / "generation_config.json").unlink()
    else:
        change(folder / "generation_config.json", eos_token_id=IDS[of_generation])
    if padding == OUTSIDE:
        rows = json.loads((folder / "config.json").read_text())["vocab_size"]
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        added = {**tokenizer["added_tokens"][0], "id": rows, "content": OUTSIDE}
        change(folder / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], added])
    (folder / "chat_template.jinja").write_text(template)
    return folder


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
