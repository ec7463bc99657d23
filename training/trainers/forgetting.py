"""How much a model forgets in training: its loss on general rows before and after.

In chats the assistant's tokens count, in texts all tokens. The model is measured in its training format: for a
quantised model, both numbers are those of the quantised base model.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy

from training.config import AdapterJob, OnError
from training.data import Row
from training.errors import DataError
from training.runs import processes
from training.runs.events import Evaluation, read_events
from training.runs.progress import Meter
from training.runs.run import Run
from training.tokens import packing
from training.tokens.documents import encode_document
from training.tokens.examples import Tokens, encoded
from training.tokens.loss_mask import encode
from training.trainers.trackers import Boards

log = logging.getLogger(__name__)

_METRIC = "general_loss"
_MUCH = 0.1
"""Relative rise of the loss that logs a warning."""
_TINY = 1e-6
LOGITS, LOGITS_AT_ONCE = 2**27, 2**24
"""The most logits of a batch, unless a single row has more, and the most converted to float32 at a time."""


class Forgetting:
    """The rows of a job's `general_files`, possibly none, measured before and after training."""

    def __init__(
        self, rows: Sequence[Row], tokenizer: Any, config: AdapterJob, run: Run, boards: Boards
    ) -> None:
        """Raises DataError if no row has a token that counts, or for a chat whose answers cannot be found."""
        self._examples = _examples(rows, tokenizer, config.max_length, config.on_error)
        self._config = config
        self._run = run
        self._boards = boards

    def before(self, model: Any) -> None:
        """Measure the model at step 0, unless the run already did before it was resumed."""
        if self._examples and self._measured_before() is None:
            self._measure(model, step=0)

    def after(self, model: Any, step: int) -> dict[str, float]:
        """Measure the model and log how the loss changed; return the losses before and after."""
        if not self._examples:
            return {}
        after = self._measure(model, step)
        before = self._measured_before()
        if before is None:
            return {_METRIC: after}
        change = (after - before) / max(before, _TINY)
        is_much = change > _MUCH
        log.log(
            logging.WARNING if is_much else logging.INFO,
            "the loss on general_files went from %.3f to %.3f nats per token (%+.1f %%)%s",
            before, after, 100 * change,
            ": the model forgets; lower learning_rate, train fewer steps, or add general rows to train_files"
            if is_much else "",
        )  # fmt: skip
        return {f"{_METRIC}_before": before, _METRIC: after}

    def _measured_before(self) -> float | None:
        return processes.led(self._told_before)

    def _told_before(self) -> float | None:
        for event in read_events(self._run.events.path):
            if isinstance(event, Evaluation) and event.step == 0 and _METRIC in event.metrics:
                return event.metrics[_METRIC]
        return None

    def _measure(self, model: Any, step: int) -> float:
        metrics = {_METRIC: mean_loss(model, self._examples, self._config.batch_size, self._config.name)}
        self._run.events.write(Evaluation(step=step, metrics=metrics))
        self._boards.write(step, metrics)
        return metrics[_METRIC]


def _examples(rows: Sequence[Row], tokenizer: Any, max_length: int, on_error: OnError) -> list[packing.Row]:
    """Return token ids, cut at `max_length`, and labels; skip rows without a token that counts."""

    def encode_row(row: Row) -> Tokens:
        if "messages" in row:
            found = encode(tokenizer, row["messages"], max_length)
            ids, mask = found.input_ids, found.loss_mask
        else:
            ids = encode_document(row, tokenizer)[:max_length]
            mask = [1] * len(ids)
        labels = [token if counts else packing.IGNORED for token, counts in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "labels": labels}

    found = [tokens for _, tokens in encoded(rows, on_error, encode_row)]
    # The first token has no prediction.
    examples = [tokens for tokens in found if any(label >= 0 for label in tokens["labels"][1:])]
    if len(examples) < len(rows):
        log.warning(
            "skipped %d of %d rows of general_files: no token counts within max_length %d",
            len(rows) - len(examples), len(rows), max_length,
        )  # fmt: skip
    if rows and not examples:
        raise DataError(
            f"no row of general_files has a token that counts within max_length {max_length}: raise max_length"
        )
    return examples


@torch.no_grad()
def mean_loss(model: Any, examples: Sequence[packing.Row], batch_size: int, name: str) -> float:
    """Return the mean loss over all labels of the examples, in nats per token. Leaves the model in evaluation mode.

    Several processes share the work, and each returns the mean of all. Draws no random numbers.
    """
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    batches = list(_batches(examples, batch_size, LOGITS // vocabulary))
    meter = Meter(f"{name}: general_files", len(batches)) if processes.leads() else None
    loss, count = 0.0, 0
    for first in range(0, len(batches), processes.count()):
        at = first + processes.number()
        # All processes gather sharded weights together, so each must run as many batches as the others.
        of_batch, tokens = _loss(model, batches[at % len(batches)], LOGITS_AT_ONCE // vocabulary)
        if at < len(batches):
            loss, count = loss + of_batch, count + tokens
        if meter is not None:
            meter.update(min(first + processes.count(), len(batches)), loss / max(1, count))
    if meter is not None:
        meter.close()
    if processes.count() > 1:
        losses, counts = zip(*gather_object([(loss, count)]), strict=True)
        loss, count = sum(losses), sum(counts)
    return loss / count


def _batches(examples: Sequence[packing.Row], rows: int, tokens: int) -> Iterator[list[packing.Row]]:
    """Yield batches of similar length, longest first: at most `rows` rows and `tokens` padded tokens, or one row."""
    ordered = sorted(examples, key=lambda example: -len(example["input_ids"]))
    at = 0
    while at < len(ordered):
        size = max(1, min(rows, tokens // len(ordered[at]["input_ids"])))
        yield ordered[at : at + size]
        at += size


def _loss(model: Any, batch: Sequence[packing.Row], at_once: int) -> tuple[float, int]:
    """Return the sum of the loss over all tokens that count, and their number."""
    shape = len(batch), max(len(example["input_ids"]) for example in batch)
    token_ids, attention_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    wanted = torch.full(shape, packing.IGNORED)
    for row, example in enumerate(batch):
        length = len(example["input_ids"])
        token_ids[row, :length] = torch.tensor(example["input_ids"])
        attention_mask[row, :length] = 1
        wanted[row, : length - 1] = torch.tensor(example["labels"][1:])
    there = model.device
    logits = model(
        input_ids=token_ids.to(there), attention_mask=attention_mask.to(there), use_cache=False
    ).logits
    pieces = zip(logits.flatten(0, 1).split(at_once), wanted.flatten().to(there).split(at_once), strict=True)
    loss = sum(float(cross_entropy(given.float(), right, reduction="sum")) for given, right in pieces)
    return loss, int((wanted != packing.IGNORED).sum())
