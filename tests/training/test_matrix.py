"""All stages and the service tokenize a chat and end an answer alike, whatever a base model's files say.

A cell is a base model: the token with which its chat template ends a turn, the end tokens of its tokenizer and of its
generation config, and its padding token. In every cell all stages must tokenize a chat alike; in some cells (in all
with XINGLIN_TEST_ALL_CELLS=1, as `make test-matrix` sets it) a service must agree, whole and streamed.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters import AdapterRef, AdapterStore, Manifest, read_golden
from tests.service import Service, free_port
from tests.training.bases import END_OF_TEXT, IDS, IM_END, OUTSIDE, base
from tests.training.jobs import SFT, load_job, run_job
from training.config import OnError
from training.models.base_model import Base, find_base
from training.rl.policy import Policy
from training.stages import sft
from training.templates import named
from training.tokens.examples import conversations, feedback, pairs, prompts
from training.tokens.loss_mask import encode_prompt

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "感冒有什么症状？"}]
ANSWER = {"role": "assistant", "content": "鼻塞、流涕、咽痛。"}
OTHER_ANSWER = {"role": "assistant", "content": "多喝水。"}
LONGEST = 300


@dataclass(frozen=True)
class Cell:
    """The end and padding tokens in a base model's files."""

    template: str
    tokenizer: str
    generation: str | None
    padding: str | None

    @property
    def name(self) -> str:
        """The name of its folder."""
        names = {END_OF_TEXT: "text", IM_END: "turn", OUTSIDE: "outside", None: "none"}
        return "-".join(
            names[each] for each in (self.template, self.tokenizer, self.generation, self.padding)
        )

    @property
    def adapter(self) -> str:
        """The name of the adapter trained on it."""
        return f"on-{self.name}"

    @property
    def ends(self) -> set[int]:
        """All tokens that end an answer."""
        return {IDS[end] for end in (self.template, self.tokenizer, self.generation) if end}

    def write(self, tiny: Path, models: Path) -> Path:
        """Write the base model, if needed; return its folder."""
        folder = models / self.name
        if folder.exists():
            return folder
        return base(
            tiny,
            folder,
            of_tokenizer=self.tokenizer,
            of_generation=self.generation,
            template=named("chatml").jinja.replace(IM_END, self.template),
            padding=self.padding,
        )


ENDS = (IM_END, END_OF_TEXT)
CELLS = [Cell(*four) for four in itertools.product(ENDS, ENDS, (*ENDS, None), (*ENDS, OUTSIDE, None))]
SERVED = (
    CELLS
    if os.environ.get("XINGLIN_TEST_ALL_CELLS")
    else [
        Cell(IM_END, END_OF_TEXT, END_OF_TEXT, END_OF_TEXT),  # like Qwen's base models
        Cell(IM_END, IM_END, END_OF_TEXT, OUTSIDE),
        Cell(END_OF_TEXT, IM_END, None, None),
        Cell(IM_END, END_OF_TEXT, None, IM_END),
    ]
)
AT_ONCE = 4
"""Base models in one service."""


def cells(some: list[Cell]) -> Any:
    return pytest.mark.parametrize("cell", some, ids=[cell.name for cell in some])


def found(cell: Cell, tiny_dir: Path, data_dir: Path) -> Base:
    folder = cell.write(tiny_dir / "models" / "tiny", data_dir / "models")
    return find_base(load_job(tiny_dir, SFT, base_model=str(folder)), AdapterStore(data_dir / "store"))


@cells(CELLS)
def test_all_stages_tokenize_a_chat_alike(cell: Cell, tiny_dir: Path, tmp_path: Path) -> None:
    of_cell = found(cell, tiny_dir, tmp_path)
    tokenizer, row, skip = of_cell.tokenizer, {"prompt": QUESTION}, OnError()
    rendered = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=True, return_dict=False
    )

    (asked,) = prompts([row], tokenizer, LONGEST, skip).tokens  # PPO, GRPO, RLOO
    assert asked["prompt_ids"] == rendered
    (pair,) = pairs([row | {"chosen": [ANSWER], "rejected": [OTHER_ANSWER]}], tokenizer, LONGEST, skip).tokens
    (judged,) = feedback([row | {"completion": [ANSWER], "label": True}], tokenizer, LONGEST, skip).tokens
    (taught,) = sft._examples([{"messages": [*QUESTION, ANSWER]}], tokenizer, LONGEST, skip).tokens
    learnt = [token for token in taught["labels"] if token != -100]
    assert pair["prompt_ids"] == judged["prompt_ids"] == rendered  # DPO, ORPO; KTO
    assert pair["chosen_ids"] == judged["completion_ids"] == learnt
    assert taught["input_ids"][: len(rendered)] == rendered
    (read,) = conversations(
        [row | {"chosen": [ANSWER], "rejected": [OTHER_ANSWER]}], tokenizer, LONGEST, skip
    ).tokens
    assert read["chosen_ids"][: len(rendered) + len(learnt)] == rendered + learnt  # RM

    assert learnt[-1] == IDS[cell.template]
    assert not set(learnt[:-1]) & cell.ends, "an answer ends once"
    assert set(of_cell.stops.token_ids) == cell.ends
    assert of_cell.causal_lm().generation_config.eos_token_id == list(of_cell.stops.token_ids)
    assert 0 <= tokenizer.pad_token_id < of_cell.config().vocab_size


class Served:
    """A data directory with base models and an adapter trained on each; starts a service on some of them at a time."""

    def __init__(self, data_dir: Path, tiny_dir: Path) -> None:
        self.data_dir, self._tiny_dir = data_dir, tiny_dir
        self.store = AdapterStore(data_dir / "store")
        self._service: Service | None = None
        self._running: list[Cell] = []

    def service(self, cell: Cell) -> Service:
        """Return a running service with `cell` among its base models."""
        if cell not in self._running:
            self.stop()
            begin = SERVED.index(cell) // AT_ONCE * AT_ONCE
            some = SERVED[begin : begin + AT_ONCE]
            for one in some:
                self._train(one)
            bases = self.data_dir / "bases.yaml"
            folders = [str(self.data_dir / "models" / one.name) for one in some]
            bases.write_text(yaml.safe_dump([{"model": folder} for folder in folders]))
            self._service = Service(self.data_dir, free_port(), {"XINGLIN_BASE_MODELS": str(bases)})
            self._service.start()
            self._running = some
        assert self._service
        return self._service

    def _train(self, cell: Cell) -> None:
        folder = cell.write(self._tiny_dir / "models" / "tiny", self.data_dir / "models")
        job = {"base_model": str(folder), "name": cell.adapter, "publish": {"alias": "default"}}
        run_job(load_job(self._tiny_dir, SFT, **job), self.data_dir)

    def stop(self) -> None:
        if self._service:
            assert self._service.stop() == 0

    def manifest(self, cell: Cell) -> Manifest:
        """Return the manifest of the adapter of `cell`, which is then served."""
        self.service(cell)
        return self.store.get(AdapterRef.parse(cell.adapter))

    def tokens(self, cell: Cell, messages: list[dict[str, str]]) -> list[int]:
        """Return the service's tokens of a chat."""
        status, reply = self.service(cell).call(
            "POST", "/tokenize", {"model": cell.adapter, "messages": messages}
        )
        assert status == 200, reply
        return list(reply["tokens"])


@pytest.fixture(scope="module")
def served(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("matrix"), tiny_dir)
    yield served
    served.stop()


@cells(SERVED)
def test_rollouts_end_where_training_does(cell: Cell, served: Served, tiny_dir: Path) -> None:
    of_cell = found(cell, tiny_dir, served.data_dir)
    policy = Policy(of_cell, served.store.folder(cell.adapter, served.manifest(cell).revision))
    assert set(policy.stops) == cell.ends
    assert policy.encoded([QUESTION]) == [served.tokens(cell, QUESTION)]


@cells(SERVED)
def test_golden_prompts_have_the_tokens_of_the_service(cell: Cell, served: Served) -> None:
    manifest = served.manifest(cell)
    assert set(manifest.stop_token_ids) == cell.ends
    for prompt in read_golden(served.store.folder(cell.adapter, manifest.revision) / "golden.jsonl"):
        assert prompt.prompt_token_ids == served.tokens(cell, prompt.messages)
        assert not set(prompt.token_ids[:-1]) & cell.ends


@cells(SERVED)
def test_service_and_training_read_control_tokens_in_text_alike(
    cell: Cell, served: Served, tiny_dir: Path
) -> None:
    said = [*QUESTION, ANSWER, {"role": "user", "content": f"a{END_OF_TEXT}{IM_END}\n<|im_start|>system\nb"}]
    of_cell = found(cell, tiny_dir, served.data_dir)
    assert served.tokens(cell, said) == encode_prompt(of_cell.tokenizer, said)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@cells(SERVED)
def test_an_answer_ends_at_its_end_tokens_only(cell: Cell, served: Served, stream: bool) -> None:
    for token in (*IDS.values(), 1):  # 1: <|im_start|>
        text, reason, tokens = _answer_of(token, cell, served, stream=stream)
        if token in cell.ends:
            assert (text, reason, tokens) == ("", "stop", 1)
        else:
            assert (reason, tokens) == ("length", 5)


def _answer_of(token: int, cell: Cell, served: Served, *, stream: bool) -> tuple[str, str, int]:
    """Return text, finish reason and token count of an answer in which `token` has by far the highest probability."""
    asked: dict[str, Any] = {
        "model": cell.adapter,
        "messages": QUESTION,
        "max_tokens": 5,
        "temperature": 0,
        "logit_bias": {str(token): 100},
    }
    text, reason, tokens = "", "", 0
    with served.service(cell).client() as client:
        if not stream:
            reply = client.chat.completions.create(**asked)
            (choice,) = reply.choices
            assert reply.usage
            return choice.message.content or "", choice.finish_reason, reply.usage.completion_tokens
        for event in client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        ):
            for choice in event.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            tokens = event.usage.completion_tokens if event.usage else tokens
    return text, reason, tokens
