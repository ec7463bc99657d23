"""PPO on the tiny model: it reaches a known optimum, starts at the reference, and resumes bit for bit after a kill."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adapters import AdapterRef, AdapterStore
from training.config import PpoConfig, load_config
from training.errors import ConfigError, TrainingError
from training.models.base_model import find_adapter, find_base
from training.rl.policy import Policy
from training.rl.rewards import adapter_scorer, standalone_scorer
from training.runs.events import Checkpoint, Evaluation, Event, EventLog, Progress, read_events
from training.runs.execute import begin, carry_out
from training.runs.run import Run
from training.stages.ppo import Ppo

PPO = {
    "stage": "ppo",
    "name": "careful",
    "base_model": "models/tiny",
    "policy": "doctor@canary",
    "reward": {"function": "tests.training.stages.test_ppo:shortness"},
    "train_files": ["doctor.jsonl"],
    "evaluation_files": ["heldout.jsonl"],
    "steps": 3,
    "batch_size": 8,
    "minibatch_size": 4,
    "max_new_tokens": 12,
    "learning_rate": 1e-3,
    "threads": 1,
    "golden": {"prompts": 8, "max_new_tokens": 6},
    "publish": {"alias": "default"},
}


def shortness(conversations: Sequence[list[dict[str, str]]]) -> list[float]:
    """A reward that is easy to increase."""
    return [-len(messages[-1]["content"]) / 10 for messages in conversations]


def starts_low(conversations: Sequence[list[dict[str, str]]]) -> list[float]:
    """Reward 1 if the first character sorts before "a", else 0."""
    return [float(messages[-1]["content"][:1] < "a") for messages in conversations]


def load(data_dir: Path, **changes: Any) -> PpoConfig:
    path = data_dir / "ppo.yaml"
    path.write_text(yaml.safe_dump({**PPO, **changes}))
    config = load_config(path, root=data_dir)
    assert isinstance(config, PpoConfig)
    return config


@pytest.fixture
def run(trained_dir: Path, tmp_path: Path) -> Iterator[Run]:
    with EventLog(tmp_path / "events.jsonl") as events:
        yield Run(tmp_path, events, AdapterStore(trained_dir / "store"))


def make(config: PpoConfig, run: Run) -> Ppo:
    torch.set_num_threads(1)
    base = find_base(config, run.store)
    _, folder = find_adapter(run.store, config.policy)
    return Ppo(config, Policy(base, folder), base, run)


def test_the_whole_stage(trained_dir: Path) -> None:
    config = load(trained_dir, reward="marks", min_reward_accuracy=0, steps=3, general_files=["plain.jsonl"])
    run_id = begin(config, trained_dir)
    published = carry_out(run_id, trained_dir)
    manifest = AdapterStore(trained_dir / "store").get(AdapterRef.parse(published.ref))
    assert (manifest.stage, manifest.task, manifest.golden_prompts) == ("ppo", "chat", 8)
    assert str(manifest.parent).startswith("doctor@")
    assert manifest.metrics["eval_kl_before"] == 0
    events = read_events(trained_dir / "runs" / run_id / "events.jsonl")
    assert [event.step for event in events if isinstance(event, Evaluation)] == [0, 0, 3, 3]
    assert manifest.metrics["general_loss"] != manifest.metrics["general_loss_before"]
    steps = [event for event in events if isinstance(event, Progress)]
    assert [event.step for event in steps] == [1, 2, 3]
    assert steps[0].metrics["kl"] == 0, "the policy starts as its reference"
    assert steps[2].metrics["kl"] != 0
    assert {"reward", "kl", "length", "stopped", "value_loss", "clip_fraction", "kl_coefficient"} <= set(
        steps[0].metrics
    )


def test_it_reaches_the_optimum(trained_dir: Path, run: Run) -> None:
    """With one question, answers of one token and a reward of 0 or 1, the objective, reward minus the KL penalty, can
    be computed exactly and maximised by its true gradient. PPO, which only sees samples, must reach the same value.

    No policy can exceed the closed form (Rafailov et al. 2023, arXiv:2305.18290, appendix A.1).
    """
    coefficient = 0.4
    reward_of = "tests.training.stages.test_ppo:starts_low"
    config = load(
        trained_dir, reward={"function": reward_of}, steps=20, batch_size=512, minibatch_size=512,
        max_new_tokens=1, no_stop_penalty=0, kl_coefficient=coefficient, learning_rate=1e-3, gae_lambda=1.0,
    )  # fmt: skip
    question = [{"role": "user", "content": "?"}]

    def chances(ppo: Ppo) -> torch.Tensor:
        ids = ppo.policy.tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=False
        )
        return ppo.policy.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)  # type: ignore[no-any-return]

    def objective(chance: torch.Tensor) -> torch.Tensor:
        return chance @ reward - coefficient * (chance * (chance / reference).log()).sum()

    climber = make(config, run)
    decode = climber.policy.tokenizer.decode
    reference = chances(climber).detach()
    reward = torch.tensor(
        starts_low(
            [[{"content": decode([token], skip_special_tokens=True)}] for token in range(len(reference))]
        )
    )
    optimizer = torch.optim.AdamW(climber.policy.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        (-objective(chances(climber))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimum = chances(climber).detach()

    ppo = make(config, run)
    for step in range(1, config.steps + 1):
        ppo.step([{"prompt": question}] * config.batch_size, step)
    found = chances(ppo).detach()

    at_first, best, reached = (float(objective(chance)) for chance in (reference, optimum, found))
    assert best - at_first > 0.05, "else there is nothing to learn"
    assert reached - at_first > 0.9 * (best - at_first)
    assert float(found @ reward) == pytest.approx(float(optimum @ reward), abs=0.03)
    bound = coefficient * float((reference * (reward / coefficient).exp()).sum().log())
    assert reached <= best + 1e-3 <= bound + 1e-3


def test_log_probabilities_are_those_without_padding(trained_dir: Path, run: Run) -> None:
    """Left padding and other rows of the batch change nothing; the reference model is the initial adapter."""
    config = load(trained_dir)
    ppo = make(config, run)
    policy = ppo.policy
    prompts = [
        [{"role": "user", "content": "?"}],
        [
            {"role": "user", "content": "得了感冒怎么办？"},
            {"role": "assistant", "content": "多休息。"},
            {"role": "user", "content": "What are the symptoms of gout?"},
        ],
    ]
    torch.manual_seed(0)
    answers = policy.answer(prompts, 10)
    logprobs, _ = policy.logprobs(answers)
    for row, prompt in enumerate(prompts):
        ids = policy.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        length = int(answers.mask[row].sum())
        answer = answers.token_ids[row, answers.prompt_length :][:length].tolist()
        assert answers.token_ids[row, : answers.prompt_length].tolist()[-len(ids) :] == ids
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1)[range(length), answer]
        torch.testing.assert_close(logprobs[row, :length].detach(), expected, atol=1e-4, rtol=0)
        assert not logprobs[row, length:].any()
    assert torch.equal(logprobs, policy.reference_logprobs(answers))


def test_only_the_policy_learns(trained_dir: Path, run: Run) -> None:
    ppo = make(load(trained_dir, reward="marks", min_reward_accuracy=0), run)
    before = {name: value.clone() for name, value in ppo.policy.model.named_parameters()}
    ppo.step([{"prompt": [{"role": "user", "content": f"{number}?"}]} for number in range(8)], 1)
    moved = {
        name for name, value in ppo.policy.model.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved
    assert all(".default." in name for name in moved)


def test_a_reward_adapter_scores_as_on_its_own_base(trained_dir: Path, run: Run) -> None:
    config = load(trained_dir, reward="marks", min_reward_accuracy=0)
    ppo = make(config, run)
    conversations = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in (("?", "Hello!"), ("得了感冒怎么办？", "您好！多休息。"), ("gout?", ""))
    ]
    total, parts = ppo._rewards(conversations, [""] * 3)
    alone = standalone_scorer("marks", find_base(config, run.store), run.store)(conversations, [""] * 3)
    assert parts == {}, "of one reward there are no parts"
    assert total.tolist() == pytest.approx(list(alone), abs=1e-5)
    assert len(set(total.tolist())) == 3


def test_a_cut_answer_gets_the_no_stop_penalty(trained_dir: Path, run: Run) -> None:
    ppo = make(load(trained_dir, no_stop_penalty=5, max_new_tokens=1), run)
    prompts = [{"prompt": [{"role": "user", "content": "?"}]}] * 4
    metrics = ppo.experience(prompts).metrics
    assert metrics["stopped"] == 0
    assert metrics["reward"] < -4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "doctor@canary"}, "is a chat adapter: name a reward adapter"),
        ({"reward": "nobody"}, "there is no adapter nobody"),
        ({"reward": {"function": "tests.nowhere:reward"}}, "cannot import tests.nowhere:reward"),
        ({"reward": {"judge": "http://127.0.0.1:9/v1", "judge_model": "m"}}, "returned no score"),
    ],
)
def test_a_missing_reward_is_an_error(
    trained_dir: Path, run: Run, changes: dict[str, Any], message: str
) -> None:
    def begin_with_it() -> None:
        ppo = make(load(trained_dir, **changes), run)
        ppo.experience([{"prompt": [{"role": "user", "content": "?"}]}])

    with pytest.raises(TrainingError, match=message):
        begin_with_it()


def test_a_reward_that_ranks_badly_is_refused(trained_dir: Path, run: Run) -> None:
    config = load(trained_dir)
    base = find_base(config, run.store)
    policy = Policy(base, find_adapter(run.store, config.policy)[1])
    with pytest.raises(ConfigError, match=r"ranks only \d+% .* below min_reward_accuracy 101%"):
        adapter_scorer(policy, "marks", "reward_1", base, run.store, least=1.01)


def test_the_reward_is_a_weighted_sum(trained_dir: Path, run: Run) -> None:
    here = "tests.training.stages.test_ppo"
    ppo = make(
        load(
            trained_dir,
            reward=[{"function": f"{here}:shortness", "weight": 2}, {"function": f"{here}:starts_low", "weight": -3}],
        ),
        run,
    )  # fmt: skip
    conversations = [[{"role": "assistant", "content": "A" * 10}], [{"role": "assistant", "content": "b"}]]
    total, parts = ppo._rewards(conversations, ["", ""])
    assert total.tolist() == pytest.approx([2 * -1 - 3, 2 * -0.1])
    assert parts == {"reward_function_1": pytest.approx(-0.55), "reward_function_2": 0.5}


def test_a_resumed_step_equals_the_uninterrupted_one(trained_dir: Path, tmp_path: Path) -> None:
    """A checkpoint has the complete state: weights, optimizer moments, value head, KL coefficient."""
    prompts = [{"prompt": [{"role": "user", "content": f"{number}?"}]} for number in range(8)]
    config = load(trained_dir, kl_target=0.1, evaluation_files=[])

    def weights(ppo: Ppo) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in ppo.policy.parameters()]

    folder = tmp_path / "one"
    folder.mkdir()
    with EventLog(folder / "events.jsonl") as events:
        straight = make(config, Run(folder, events, AdapterStore(trained_dir / "store")))
        straight.step(prompts, 1)
        straight._save(1)
        straight.step(prompts, 2)
        half = folder / "checkpoints" / "checkpoint-2"
        half.mkdir()  # a later checkpoint, left incomplete by a kill
        (half / "state.pt").write_bytes(b"torn")
        resumed = make(config, Run(folder, events, AdapterStore(trained_dir / "store")))
        assert resumed._resume() == 1
        assert not half.exists()
        resumed.step(prompts, 2)
    assert all(torch.equal(*both) for both in zip(weights(straight), weights(resumed), strict=True))
    assert straight._kl.value == resumed._kl.value
    assert not math.isclose(straight._kl.value, config.kl_coefficient)
    assert os.listdir(folder / "checkpoints") == ["checkpoint-1"]


def test_the_metrics_of_the_last_step_survive_a_kill(
    trained_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(trained_dir, evaluation_files=[], steps=2)

    class Killed(BaseException): ...

    def write(self: EventLog, event: Event) -> None:
        real(self, event)
        if isinstance(event, Checkpoint) and event.step == config.steps:
            raise Killed

    real = EventLog.write
    run_id = begin(config, trained_dir)
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "write", write)
        with pytest.raises(Killed):
            carry_out(run_id, trained_dir)
    published = carry_out(run_id, trained_dir)
    manifest = AdapterStore(trained_dir / "store").get(AdapterRef.parse(published.ref))
    events = read_events(trained_dir / "runs" / run_id / "events.jsonl")
    assert manifest.metrics == [event.metrics for event in events if isinstance(event, Progress)][-1]
