"""Stop tokens: one rule for all combinations of a base model's files and its chat template."""

import itertools
from pathlib import Path
from shutil import copytree

import pytest
from transformers import AutoConfig, AutoTokenizer

from adapters import AdapterStore
from tests.training.bases import END_OF_TEXT, IDS, IM_END, base, change
from tests.training.jobs import LoadJob
from training.models.base_model import find_base
from training.templates import NAMES, named
from training.tokens.loss_mask import encode, template_stops
from training.tokens.stop_tokens import find_stops, model_stops

CHATML = named("chatml").jinja
CHAT = [{"role": "user", "content": "What helps?"}, {"role": "assistant", "content": "Rest."}]


def stops(folder: Path, *texts: str, token_ids: tuple[int, ...] = ()) -> tuple[set[int], tuple[str, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = find_stops(folder, AutoConfig.from_pretrained(folder), tokenizer, texts, token_ids)
    return set(found.token_ids), found.texts


@pytest.mark.parametrize(
    ("of_template", "of_tokenizer", "of_generation"),
    list(itertools.product([IM_END, END_OF_TEXT], [IM_END, END_OF_TEXT], [IM_END, END_OF_TEXT, None])),
)
def test_all_stop_tokens_are_found_including_the_trained_one(
    tiny_dir: Path, tmp_path: Path, of_template: str, of_tokenizer: str, of_generation: str | None
) -> None:
    folder = base(
        tiny_dir / "models" / "tiny",
        tmp_path / "base",
        of_tokenizer=of_tokenizer,
        of_generation=of_generation,
        template=CHATML.replace(IM_END, of_template),
    )
    found, texts = stops(folder)
    assert found == {IDS[end] for end in (of_template, of_tokenizer, of_generation) if end}
    assert not texts
    encoded = encode(AutoTokenizer.from_pretrained(folder), CHAT)
    learnt = [token for token, mask in zip(encoded.input_ids, encoded.loss_mask, strict=True) if mask]
    assert learnt[-1] == IDS[of_template], "the end that is taught is not the template's"


def test_a_template_with_different_stops_inside_and_at_the_end(tiny_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir / "models" / "tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        f"{{{{ '{END_OF_TEXT}' if loop.last else '{IM_END}' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert sorted(template_stops(tokenizer)) == [0, 2]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert template_stops(tokenizer) == [], "it ends answers with no special token"


def test_stop_texts_that_are_tokens_count_as_tokens(tiny_dir: Path) -> None:
    found, texts = stops(tiny_dir / "models" / "tiny", IM_END, END_OF_TEXT, "USER:", token_ids=(7,))
    assert found == {0, 2, 7}
    assert texts == ("USER:",)


def test_several_end_tokens_of_a_generation_config(tiny_dir: Path, tmp_path: Path) -> None:
    folder = copytree(tiny_dir / "models" / "tiny", tmp_path / "base")
    change(folder / "generation_config.json", eos_token_id=[2, 5])
    assert model_stops(folder, AutoConfig.from_pretrained(folder)) == [2, 5]


@pytest.mark.parametrize("of_tokenizer", [IM_END, END_OF_TEXT])
@pytest.mark.parametrize("name", NAMES)
def test_every_named_template_stops_where_it_is_trained_to(
    tiny_dir: Path, tmp_path: Path, name: str, of_tokenizer: str
) -> None:
    folder = base(
        tiny_dir / "models" / "tiny",
        tmp_path / "base",
        of_tokenizer=of_tokenizer,
        of_generation=None,
        template=named(name).jinja,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.bos_token or END_OF_TEXT
    found, texts = stops(folder, *named(name).stop)
    encoded = encode(tokenizer, CHAT)
    learnt = [token for token, mask in zip(encoded.input_ids, encoded.loss_mask, strict=True) if mask]
    # On a base that lacks the template's token, its letters are learnt and looked for.
    assert learnt[-1] in found or tokenizer.decode(learnt).endswith(texts)


def test_a_model_in_training_has_the_stops_of_its_base(load_sft: LoadJob, tmp_path: Path) -> None:
    found = find_base(load_sft(chat_template="qwen"), AdapterStore(tmp_path))
    assert found.causal_lm().generation_config.eos_token_id == list(found.stops.token_ids)
    assert found.stops.token_ids
