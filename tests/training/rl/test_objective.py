"""Each term of the objective against its definition, computed token by token in plain Python."""

import math
import random

import pytest
import torch

from training.rl.objective import (
    KlCoefficient,
    advantages,
    masked_mean,
    policy_loss,
    value_loss,
    whiten,
)

LENGTHS = [5, 1, 3]
CHANCE = random.Random(7)
MASK = torch.tensor([[1.0] * length + [0.0] * (5 - length) for length in LENGTHS])


def drawn(scale: float = 1.0) -> torch.Tensor:
    """Random numbers, also where the mask is 0, as those must not count."""
    return torch.tensor([[CHANCE.gauss(0, scale) for _ in range(5)] for _ in LENGTHS])


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_advantages_are_discounted_sums_of_td_errors(lam: float) -> None:
    rewards, values = drawn(), drawn()
    found = advantages(rewards, values, MASK, lam)
    for row, length in enumerate(LENGTHS):
        r, v = rewards[row].tolist(), [*values[row].tolist()[:length], 0.0]
        td_errors = [r[t] + v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum(lam ** (later - t) * td_errors[later] for later in range(t, length))
            assert found[row, t].item() == pytest.approx(expected, abs=1e-5)
    assert not found[MASK == 0].any()


def test_with_lambda_one_the_advantage_is_return_minus_value() -> None:
    rewards, values = drawn(), drawn()
    found = advantages(rewards, values, MASK, 1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            earned = sum(rewards[row, t:length].tolist())
            assert found[row, t].item() == pytest.approx(earned - values[row, t].item(), abs=1e-5)


def test_whitened_values_have_mean_zero_and_variance_one() -> None:
    chosen = whiten(drawn(3.0) + 10, MASK)[MASK.bool()]
    assert chosen.mean().item() == pytest.approx(0, abs=1e-6)
    assert chosen.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert not whiten(drawn(), MASK)[MASK == 0].any()


def test_the_policy_loss_is_the_clipped_surrogate() -> None:
    logprobs, old, advantage = drawn(), drawn(), drawn()
    expected = []
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            ratio = math.exp(logprobs[row, t].item() - old[row, t].item())
            a = advantage[row, t].item()
            expected.append(min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
    found = policy_loss(logprobs, old, advantage, MASK, clip=0.2)
    assert found.item() == pytest.approx(-sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "learns"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False)],
)
def test_beyond_the_clip_only_steps_back_have_a_gradient(
    ratio: float, advantage: float, learns: bool
) -> None:
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    policy_loss(logprob, torch.zeros(1, 1), advantage * one, one, clip=0.2).backward()
    assert logprob.grad is not None
    assert bool(logprob.grad.any()) is learns


def test_the_value_loss_is_half_the_mean_squared_error() -> None:
    values, returns = drawn(), drawn()
    squares = [
        (values[row, t].item() - returns[row, t].item()) ** 2
        for row, length in enumerate(LENGTHS)
        for t in range(length)
    ]
    assert value_loss(values, returns, MASK).item() == pytest.approx(
        sum(squares) / len(squares) / 2, rel=1e-5
    )


def test_every_token_has_the_same_weight() -> None:
    values = torch.tensor([[1.0] * 5, [10.0] * 5, [100.0] * 5])
    assert masked_mean(values, MASK).item() == pytest.approx((5 * 1 + 10 + 3 * 100) / 9)


def test_the_coefficient_follows_the_proportional_controller() -> None:
    coefficient = KlCoefficient(0.2, target=2.0)
    coefficient.update(2.2)  # 10 % above the target
    assert coefficient.value == pytest.approx(0.2 * (1 + 0.1 * 0.5))
    coefficient.update(100.0)  # changes by at most a tenth
    assert coefficient.value == pytest.approx(0.2 * 1.05 * 1.1)
    coefficient.update(0.0)
    assert coefficient.value == pytest.approx(0.2 * 1.05 * 1.1 * 0.9)


def test_without_a_target_the_coefficient_is_constant() -> None:
    coefficient = KlCoefficient(0.2, target=None)
    coefficient.update(100.0)
    assert coefficient.value == 0.2
