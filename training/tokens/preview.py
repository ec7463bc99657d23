"""Shows the training data of a job: rows as the model sees them, with loss tokens marked.

The output comes from the token ids, not from the files. It shows additions of the template, cuts by max_length, special
tokens and invisible characters.
"""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TextIO

from training.tokens.documents import encode_document, split
from training.tokens.loss_mask import Encoded, MaskError, encode, encode_prompt
from training.tokens.packing import pack

Row = dict[str, Any]

_RESET, _BOLD, _FAINT, _GREEN, _RED, _REVERSE = "0", "1", "2", "32", "31", "7"


def wants_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def preview(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    colour: bool,
    max_length: int,
    shown: int = 3,
    reads_on: bool = False,
    packing: bool | None = False,
) -> Iterator[str]:
    """Yield lines to print: a legend, the first `shown` rows, and statistics of all rows.

    `rows` are canonical rows of one kind. With `reads_on`, every token has loss and long rows are split, as in stage
    pt; `packing` packs the parts (None: if the base model can keep them apart). Without `colour`, marks replace colors.
    """
    pen = _Pen(colour)
    yield pen.legend()
    figures = _Figures(max_length)
    for number, row in enumerate(rows, start=1):
        try:
            parts = [_document(row, tokenizer, max_length)] if reads_on else _parts(row, tokenizer)
        except MaskError as error:
            figures.refused.append((number, str(error)))
            if number <= shown:
                yield f"\n{pen.title(f'row {number}')}  cannot be used: {error}"
            continue
        figures.count(number, parts)
        if number <= shown:
            yield ""
            yield from _show(number, len(rows), parts, tokenizer, pen, max_length)
    yield ""
    yield from figures.lines(len(rows))
    if figures.read_as:
        yield _packed(figures.read_as, packing, max_length)


def _packed(lengths: list[int], packing: bool | None, max_length: int) -> str:
    if packing is False:
        return f"packed    no: {len(lengths):,} rows, each a document or a part of one"
    rows = pack([{"input_ids": range(length), "labels": range(length)} for length in lengths], max_length)
    full = sum(lengths) / (len(rows) * max_length)
    known = "" if packing else ", if the base model's architecture can keep them apart"
    made = f"{len(lengths):,} documents and parts into {len(rows):,} rows of max_length {max_length:,}"
    return f"packed    {made}, {full:.0%} full{known}"


@dataclass(frozen=True)
class _Part:
    """One token sequence of a row, uncut."""

    title: str
    ids: list[int]
    mask: list[int]
    begin: int = 0
    """Tokens before this index are the same as in the previous part and not shown again."""
    is_bad: bool = False
    """Whether the answer is rejected or labeled bad."""
    is_served_alike: bool = True
    """Whether it begins with the tokens of the server's prompt."""
    lengths: Sequence[int] = ()
    """Lengths of the parts that a document is split into."""


def _document(row: Row, tokenizer: Any, max_length: int) -> _Part:
    ids = encode_document(row, tokenizer)
    title = "chat read as a document" if "messages" in row else "document"
    return _Part(title, ids, [1] * len(ids), lengths=[len(part) for part in split(ids, max_length)])


def _parts(row: Row, tokenizer: Any) -> list[_Part]:
    if "messages" in row:
        return [_chat("chat", row["messages"], tokenizer)]
    prompt = [
        message | {"weight": 0} if message["role"] == "assistant" else message for message in row["prompt"]
    ]
    if "chosen" in row:
        chosen = _chat("chosen", [*prompt, *row["chosen"]], tokenizer)
        return [chosen, _chat("rejected", [*prompt, *row["rejected"]], tokenizer, after=chosen, is_bad=True)]
    if "completion" in row:
        title = "good answer" if row["label"] else "bad answer"
        return [_chat(title, [*prompt, *row["completion"]], tokenizer, is_bad=not row["label"])]
    ids = encode_prompt(tokenizer, prompt)
    return [_Part("prompt", ids, [0] * len(ids))]


def _chat(
    title: str, messages: list[Row], tokenizer: Any, after: _Part | None = None, is_bad: bool = False
) -> _Part:
    encoded: Encoded = encode(tokenizer, messages)
    ids, mask = encoded.input_ids, encoded.loss_mask
    prompt = encode_prompt(tokenizer, messages[:-1])
    begin = mask.index(1) if after else 0
    if after and ids[:begin] != after.ids[:begin]:
        begin = 0  # the template renders a different prompt before this answer
    return _Part(title, ids, mask, begin, is_bad, ids[: len(prompt)] == prompt)


def _show(
    number: int, rows: int, parts: list[_Part], tokenizer: Any, pen: "_Pen", max_length: int
) -> Iterator[str]:
    for part in parts:
        learnt = sum(part.mask) if part.lengths else sum(part.mask[:max_length])
        facts = [f"{len(part.ids):,} tokens", f"{learnt:,} with loss"]
        if len(part.lengths) > 1:
            facts.append(
                f"split into {len(part.lengths):,} parts of at most {max_length:,}, the first is shown"
            )
        elif len(part.ids) > max_length:
            facts.append(f"over max_length {max_length:,}, shown up to it")
            if any(part.mask) and not learnt:
                facts.append("no answer is left")
        if not part.is_served_alike:
            facts.append("the server's prompt has different tokens")
        yield f"{pen.title(f'row {number} of {rows}, {part.title}')}  {', '.join(facts)}"
        yield _text(part, tokenizer, pen, max_length).removesuffix("\n")


def _text(part: _Part, tokenizer: Any, pen: "_Pen", max_length: int) -> str:
    special = tokenizer.added_tokens_decoder
    # A token may be part of a character, so decode whole runs of tokens of the same kind.
    cut = _whole_characters(tokenizer, part.ids[: part.lengths[0] if part.lengths else max_length])
    kinds = [
        (bool(loss), at if token in special else -1)
        for at, (token, loss) in enumerate(zip(cut, part.mask, strict=False))
    ]
    shown = []
    before, seen = part.begin, tokenizer.decode(cut[: part.begin])
    for kind, run in groupby(kinds[part.begin :]):
        end = before + len(list(run))
        # Decode the run in context: alone, a tokenizer may drop its leading space.
        whole = tokenizer.decode(cut[:end])
        text = whole[len(seen) :] if whole.startswith(seen) else tokenizer.decode(cut[before:end])
        shown.append((text, kind[0], kind[1] >= 0))
        before, seen = end, whole
    return pen.paint(shown, part.is_bad) + ("…" if len(cut) < len(part.ids) else "")


def _whole_characters(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return `ids` without an incomplete character at the end."""
    for spare in range(4):
        shorter = ids[: len(ids) - spare]
        if not tokenizer.decode(shorter).endswith("\ufffd"):
            return shorter
    return ids


@dataclass(frozen=True)
class _Pen:
    """Marks loss and special tokens, by color or by characters around them."""

    colour: bool

    def legend(self) -> str:
        learnt, special = (
            self.paint([("with loss", True, False)]),
            self.paint([("special token", False, True)]),
        )
        return f"{learnt}  {special}  ↵ line break  ⇥ tab"

    def title(self, text: str) -> str:
        return self._style(text, _BOLD) if self.colour else f"── {text} ──"

    def paint(self, runs: Sequence[tuple[str, bool, bool]], is_bad: bool = False) -> str:
        """Render `runs` of (text, has loss, is a special token)."""
        painted = []
        for loss, group in groupby(runs, key=lambda run: run[1]):
            texts = [(_visible(text), special) for text, _, special in group]
            if self.colour:
                ink = [_RED if is_bad else _GREEN] if loss else []
                painted += [self._style(text, *ink, *[_REVERSE] * special) for text, special in texts]
            else:
                inner = "".join(f"«{text}»" if special else text for text, special in texts)
                painted.append(f"⟦{inner}⟧" if loss else inner)
        return "".join(painted)

    @staticmethod
    def _style(text: str, *codes: str) -> str:
        if not codes:
            return text
        on, off = f"\033[{';'.join(codes)}m", f"\033[{_RESET}m"
        return "\n".join(
            f"{on}{line}{off}" if line else "" for line in text.split("\n")
        )  # pagers reset at each line


def _visible(text: str) -> str:
    """Return the text with control and invisible characters made visible."""
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return {"\n": "↵\n", "\t": "⇥\t"}[character]
    if unicodedata.category(character) in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}:
        return f"<U+{ord(character):04X}>"
    return character


@dataclass
class _Figures:
    """Statistics of all rows."""

    max_length: int
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """Length of each row in tokens (of a pair: with the longer answer), and its number."""
    tokens: int = 0
    learnt: int = 0
    emptied: int = 0
    served_otherwise: list[int] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    read_as: list[int] = field(default_factory=list)
    """Lengths of the parts of all documents."""

    def count(self, number: int, parts: list[_Part]) -> None:
        self.lengths.append((max(len(part.ids) for part in parts), number))
        self.tokens += sum(len(part.ids) for part in parts)
        self.learnt += sum(sum(part.mask if part.lengths else part.mask[: self.max_length]) for part in parts)
        self.read_as += [length for part in parts for length in part.lengths]
        self.emptied += any(any(part.mask) and not any(part.mask[: self.max_length]) for part in parts)
        if not all(part.is_served_alike for part in parts):
            self.served_otherwise.append(number)

    def lines(self, rows: int) -> Iterator[str]:
        yield f"rows      {rows:,}"
        if self.refused:
            number, reason = self.refused[0]
            yield f"unusable  {len(self.refused):,}, the first is row {number}: {reason}"
        if not self.lengths:
            return
        share = self.learnt / max(1, self.tokens)
        yield f"tokens    {self.tokens:,}, of which {self.learnt:,} ({share:.0%}) have loss"
        longest, number = max(self.lengths, key=lambda found: found[0])
        ordered = sorted(length for length, _ in self.lengths)
        shares = (f"{share} % up to {ordered[(len(ordered) - 1) * share // 100]:,}" for share in (50, 90, 99))
        yield f"length    {', '.join(shares)}; longest {longest:,} (row {number})"
        over = sum(length > self.max_length for length in ordered)
        left = f", of which {self.emptied:,} lose the whole answer" if self.emptied else ""
        left += ", split into parts" if self.read_as and over else ""
        yield f"too long  {over:,} over max_length {self.max_length:,}{left}"
        if self.served_otherwise:
            yield (
                f"served    {len(self.served_otherwise):,} rows, the first is row {self.served_otherwise[0]}, do not "
                "begin with the server's prompt: the template opens a pending answer differently, or the tokenizer "
                "merges the end of the prompt with the start of the answer"
            )
