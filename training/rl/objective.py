"""The arithmetic of PPO, on tensors of shape (answers, tokens); `mask` is 1.0 on the tokens of an answer."""

import torch
from torch import Tensor


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """Return generalised advantage estimates, without discount (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    `values[:, t]` is the value before token t. The value after an answer's last token is zero, whether the answer
    stopped or was cut.
    """
    found = torch.zeros_like(rewards)
    later = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] * mask[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + next_value - values[:, t]
        later = (delta + gae_lambda * later) * mask[:, t]
        found[:, t] = later
    return found


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Scale to mean 0 and standard deviation 1 over the masked tokens; 0 elsewhere."""
    chosen = values[mask.bool()]
    return (values - chosen.mean()) / (chosen.std(correction=0) + 1e-8) * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the masked tokens of all answers together."""
    return (values * mask).sum() / mask.sum()


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Return the clipped surrogate loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.min(ratio * advantage, clipped * advantage), mask)


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return half the mean squared error. Clipping it does not help (Andrychowicz et al., arXiv:2006.05990)."""
    return 0.5 * masked_mean((values - returns) ** 2, mask)


class KlCoefficient:
    """The KL coefficient, constant or adapted towards a target KL.

    The proportional controller of Ziegler et al. 2019 (arXiv:1909.08593, section 2.2), with five times their gain,
    as their runs took thousands of steps.
    """

    _GAIN = 0.5
    _MOST_ERROR = 0.2

    def __init__(self, value: float, target: float | None) -> None:
        self.value = value
        self._target = target

    def update(self, kl: float) -> None:
        """Adapt the coefficient to `kl`, the mean KL of an answer in the last step, in nats."""
        if self._target is not None:
            error = max(-self._MOST_ERROR, min(self._MOST_ERROR, kl / self._target - 1))
            self.value *= 1 + self._GAIN * error
