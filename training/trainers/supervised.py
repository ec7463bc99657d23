"""The trainer of stages pt and sft: TRL's, with its own order of rows and its own head on a CPU."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from trl import SFTTrainer

from training.trainers.cpu_head import score_learnt_only

_BATCHES_IN_BUCKET = 50


class SupervisedTrainer(SFTTrainer):
    """TRL's trainer for supervised fine-tuning, with AlikeBatches and the head of cpu_head."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        score_learnt_only(self.model)

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        """Collect each evaluation row's loss, its number of correct top-1 tokens and its number of learned tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = model(**inputs, use_cache=False, fused_lm_head=True)
        of_rows = torch.stack([-found.log_probs.double(), found.is_top1.double(), found.label_mask.double()])
        self._counted.append(self.accelerator.gather_for_metrics(of_rows.sum(-1).T.contiguous()).cpu())
        return -found.log_probs.sum() / found.label_mask.sum().clamp(min=1), None, None

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Run TRL's loop, with means over all learned tokens: a mean over batches depends on how rows are batched."""
        self._counted: list[torch.Tensor] = []
        output = super().evaluation_loop(*arguments, **options)
        nats, right, tokens = torch.cat(self._counted).sum(0).tolist()
        (loss,) = [name for name in output.metrics if name.endswith("_loss")]
        output.metrics[loss] = nats / tokens
        output.metrics[loss.removesuffix("loss") + "mean_token_accuracy"] = right / tokens
        return output

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = train_dataset or self.train_dataset
        return AlikeBatches(
            [len(ids) for ids in rows["input_ids"]],
            # The batches of all processes together, so that none waits for another's longer rows.
            self.args.train_batch_size * self.args.world_size,
            self.args.seed,
            lambda: int(self.state.epoch or 0),
        )


class AlikeBatches(Sampler[int]):
    """Groups rows of similar length into batches, and yields the batches in random order.

    This needs little padding, and short and long rows still alternate over the steps; transformers' `group_by_length`
    orders by length, so that the last steps see one kind of row. The order depends only on the seed and the epoch, so
    a resumed run continues in it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed} {self._epoch()}")  # noqa: S311 - an order, not a secret
        rows = chance.sample(range(len(self)), len(self))
        bucket = self._batch_size * _BATCHES_IN_BUCKET
        batches = []
        for start in range(0, len(rows), bucket):
            alike = sorted(rows[start : start + bucket], key=self._lengths.__getitem__)
            batches += [alike[at : at + self._batch_size] for at in range(0, len(alike), self._batch_size)]
        # A partial batch stays last: elsewhere it would shift the boundaries of all batches after it.
        rest = [batches.pop()] if len(rows) % self._batch_size else []
        chance.shuffle(batches)
        return (row for batch in (*batches, *rest) for row in batch)
