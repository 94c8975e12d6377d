"""A teacher with another tokenizer: both tokenise the same text, and its chunks on which both agree are numbered.

For: `kd_cross_tokenizer` "chunks", which compares the likelihoods of these chunks. A chunk ends where both sides end
a token and begin the next one behind it, so that the tokens of a chunk are the same text on both sides.
Letters: N tokens of a batch of rows, one row behind the other; "text positions" count characters.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ..losses import IGNORE_INDEX
from ..tasks import CHUNK_IDS, TEACHER_PREFIX
from ..validation import check_number, fail
from .columns import NO_CHUNK, check_dataset

Array = np.ndarray


def align_teacher_tokens(
    dataset: Any,
    text_column: str,
    *,
    tokenizer: Any,
    teacher_tokenizer: Any,
    max_length: int | None = None,
    label_column: str | None = None,
    append_eos: bool = False,
    **map_kwargs: Any,
) -> Any:
    """The dataset tokenised for student and teacher, with the text chunks that the tokens of both tile.

    When to use: a causal language model whose teacher has another tokenizer, with `kd_cross_tokenizer` "chunks" and
    `TeacherCollator` around the data collator.

    Args:
        dataset: a `Dataset`, `DatasetDict` or `IterableDataset`.
        text_column: the column of the text; or of chats, lists of messages {"role", "content"}: each tokenizer's own
            chat template is applied, and the contents are aligned, not the template. An EOS token behind a content, or
            behind the text, is a chunk on its own where both sides have it.
        tokenizer, teacher_tokenizer: fast tokenizers, which give the text positions of their tokens.
        max_length: tokens kept of a row, on either side. Default None: all.
        label_column: the student's labels, one for each of its tokens; a chunk with a label of -100 is left out on both
            sides. Default None; masks that the data collator makes are honoured too.
        append_eos: whether both sides get their EOS token behind the text. Default False.
        map_kwargs: passed to `dataset.map`, e.g. num_proc or remove_columns.

    Returns:
        A new dataset with `input_ids`, `attention_mask`, `chunk_ids`, and the same of the teacher as `teacher_*`. The
        tokens of chunk i of a row have the id i on both sides; -1: template, special and unknown tokens, and what
        truncation has left without a counterpart.

    Raises:
        ValueError: a column that is not there, a tokenizer without text positions or chat template, labels of another
            length.

    Example::

        data = align_teacher_tokens(data, "text", tokenizer=tokenizer, teacher_tokenizer=teacher_tokenizer)
        collator = TeacherCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False), teacher_tokenizer)
        args = DistillationTrainingArguments("out", kd_cross_tokenizer="chunks", kd_alpha=0.5)

    Source: approximate likelihood matching, Minixhofer, Vulic and Ponti 2025, arXiv:2503.20083.
    """
    names = [text_column] if label_column is None else [text_column, label_column]
    check_dataset(dataset, names, "text_column")
    named = {"tokenizer": tokenizer, "teacher_tokenizer": teacher_tokenizer}
    for argument, given in named.items():
        _check_tokenizer(argument, given, append_eos)
    if max_length is not None:
        check_number("max_length", max_length, low=1)
    aligner = _Aligner(text_column, tokenizer, teacher_tokenizer, max_length, label_column, append_eos)
    return dataset.map(aligner, batched=True, **map_kwargs)


def _check_tokenizer(argument: str, tokenizer: Any, append_eos: bool) -> None:
    if not getattr(tokenizer, "is_fast", False):
        because = "only these give the place of a token in the text (offsets)"
        fix = "Load it with AutoTokenizer.from_pretrained(..., use_fast=True), or convert it to a tokenizer.json."
        fail(argument, f"a slow {type(tokenizer).__name__}", "a fast tokenizer", fix, because=because)
    if append_eos and tokenizer.eos_token_id is None:
        fix = f"Set {argument}.eos_token, or leave append_eos out."
        fail("append_eos", True, f"False, where {argument} has no EOS token", fix)


class Segment(NamedTuple):
    """A part of a row's text on one side that stands in the text of the other side too: a content, or an EOS."""

    start: int  # text positions on this side
    end: int
    first: int  # positions in what both sides share: of `start`, and of the end before white space was stripped
    last: int


@dataclass(frozen=True)
class _Aligner:
    """What `dataset.map` calls; a module's class, so that its fingerprint is that of its fields."""

    text_column: str
    tokenizer: Any
    teacher_tokenizer: Any
    max_length: int | None
    label_column: str | None
    append_eos: bool

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        rows = list(batch[self.text_column])
        kind: type = str if isinstance(rows[0], str) else list
        if not all(isinstance(row, kind) for row in rows):
            shown = next(repr(row) for row in rows if not isinstance(row, kind))
            fail("text_column", shown, "texts in all rows, or lists of messages in all", "Leave such rows out.")
        labels = None if self.label_column is None else list(batch[self.label_column])
        given = {"tokenizer": self.tokenizer, "teacher_tokenizer": self.teacher_tokenizer}
        student, teacher = (self._tokens(name, tokenizer, rows) for name, tokenizer in given.items())
        masked = None if labels is None else self._masked(labels, student)
        ids = align(student, teacher, masked=masked)
        made: dict[str, Any] = {}
        for prefix, tokens, chunks in (("", student, ids[0]), (TEACHER_PREFIX, teacher, ids[1])):
            made[prefix + "input_ids"] = tokens.rows(tokens.ids)
            made[prefix + "attention_mask"] = [np.ones_like(row) for row in made[prefix + "input_ids"]]
            made[prefix + CHUNK_IDS] = tokens.rows(chunks)
        if labels is not None and self.label_column is not None:
            kept = map(len, made["input_ids"])
            made[self.label_column] = [row[:count] for row, count in zip(labels, kept, strict=True)]
        return made

    def _tokens(self, argument: str, tokenizer: Any, rows: Sequence[Any]) -> Tokens:
        chats = not isinstance(rows[0], str)
        if chats:
            rendered = [_rendered(argument, tokenizer, row) for row in rows]
            texts, segments = [text for text, _ in rendered], [parts for _, parts in rendered]
        else:
            texts, segments = list(rows), [[Segment(0, len(text), 0, len(text))] for text in rows]
        options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "verbose": False}
        encoded = tokenizer(texts, add_special_tokens=not chats, return_attention_mask=False, **options)
        ids, offsets, special = (encoded[k] for k in ("input_ids", "offset_mapping", "special_tokens_mask"))
        if not chats:
            end = tokenizer.eos_token_id
            for text, own, places, mask, parts in zip(texts, ids, offsets, special, segments, strict=True):
                if not (own and own[-1] == end and mask[-1]):
                    if not self.append_eos:
                        continue
                    own.append(end)
                    places.append(None)
                    mask.append(0)
                # The EOS stands behind the text, as a character of its own.
                places[-1], mask[-1] = (len(text), len(text) + 1), 0
                parts.append(Segment(len(text), len(text) + 1, len(text) + 1, len(text) + 2))
        unknown = None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id  # GPT-2 has one
        return Tokens.of(texts, ids, offsets, special, segments, unknown, self.max_length)

    def _masked(self, labels: Sequence[Any], student: Tokens) -> Array:
        """Which of the student's tokens have no label."""
        for row, (count, given) in enumerate(zip(student.lengths, labels, strict=True)):
            if len(given) != count:
                fix = "Make the labels of the same text with the same tokenizer, or mask in the data collator instead."
                shown = f"{len(given)} labels in row {row}"
                fail("label_column", shown, f"{count}, one for each token of the student", fix)
        return np.fromiter((label for row in labels for label in row), np.int64) == IGNORE_INDEX


def _rendered(argument: str, tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Segment]]:
    """The text of a chat by the tokenizer's template, and where in it the contents and the EOS behind them stand."""
    if tokenizer.chat_template is None:
        fix = "Set its chat_template, or give a column of text."
        fail(argument, "a tokenizer without chat_template", "one with a template for messages", fix)
    contents: list[Any] = [message.get("content") for message in messages]
    if not all(isinstance(content, str) for content in contents):
        fail("text_column", "a message whose content is no text", "messages of text", "Leave such rows out.")

    def render(contents: Sequence[str]) -> str:
        changed = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        return tokenizer.apply_chat_template(changed, tokenize=False)

    # What the template writes between the contents is found with marks in their place.
    marks = [f"\ue000{i}\ue001" for i in range(len(contents))]
    text, rest, position, shared, segments = render(contents), render(marks), 0, 0, []
    end = tokenizer.eos_token
    for number, content in enumerate(contents):
        before, found, rest = rest.partition(marks[number])
        after = rest.partition(marks[number + 1])[0] if number + 1 < len(marks) else rest
        forms = (content, content.strip(), content.lstrip(), content.rstrip())  # templates may strip
        shown = next((form for form in forms if text.startswith(before + form + after, position)), None)
        if not found or shown is None:
            fix = "Use a template that writes every content as it is, or give a column of text."
            fail(argument, f"a tokenizer whose template changes {content[:30]!r}", "one that keeps contents", fix)
        start = position + len(before)
        position = start + len(shown)
        segments.append(Segment(start, position, shared + content.find(shown), shared + len(content)))
        if end and after.lstrip().startswith(end):
            place = position + len(after) - len(after.lstrip())
            segments.append(Segment(place, place + len(end), shared + len(content) + 1, shared + len(content) + 2))
        shared += len(content) + 3
    return text, segments


# ---- arrays of all rows at once -------------------------------------------------------------------------------------

_LAST = 1 << 62  # beyond all positions
_ROW = 1 << 32  # positions of row r begin at r * _ROW, so that one search serves all rows


def _behind_marks(texts: Sequence[str], end: Array) -> Array:
    """The ends of tokens, behind the combining marks that follow: a normaliser may have joined these with the token."""
    joined = "".join(texts)
    if joined.isascii():
        return end
    letters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    marks = np.flatnonzero(_combining()[np.minimum(letters, len(_combining()) - 1)])
    starts = np.cumsum([0, *map(len, texts)])
    row = np.searchsorted(starts, marks, side="right") - 1
    marks = np.append(marks - starts[row] + row * _ROW, _LAST)
    stops = np.where(np.append(marks[1:] != marks[:-1] + 1, True), marks + 1, _LAST)
    stops = np.minimum.accumulate(stops[::-1])[::-1]  # of the run of marks that each is in
    place = np.searchsorted(marks, end)
    return np.where(marks[place] == end, stops[place], end)


@functools.cache
def _combining() -> Array:
    """[codes] whether a letter combines with the one before: marks, and the vowels and finals of Hangul, also as NFKC
    has them (of half width)."""
    letters = (unicodedata.normalize("NFKC", chr(code))[0] for code in range(0x1F000))
    return np.array([unicodedata.category(x)[0] == "M" or "\u1160" <= x <= "\u11ff" for x in letters])


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch on one side, one row behind the other.

    Attributes:
        ids: [N]; lengths: tokens of each row; kept: [N] whether truncation leaves them; unknown: [N] bool.
        inside: [M] which of them stand inside a segment. The others have an entry for each of these:
        segment: its last shared position; opened: whether a token stands across the start of the segment.
        end: the shared position where the token ends, if those behind it begin there or later; else -1.
    """

    ids: Array
    lengths: Array
    kept: Array
    unknown: Array
    inside: Array
    segment: Array
    opened: Array
    end: Array

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        offsets: Sequence[Sequence[tuple[int, int]]],
        special: Sequence[Sequence[int]],
        segments: Sequence[Sequence[Segment]],
        unknown_id: int | None,
        max_length: int | None,
    ) -> Tokens:
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int64)
        row = np.repeat(np.arange(len(ids)), lengths)
        places = np.fromiter(chain.from_iterable(chain.from_iterable(offsets)), np.int64).reshape(-1, 2)
        begin, end = (places + row[:, None] * _ROW).T
        written = np.fromiter(chain.from_iterable(special), np.int64) == 0
        number = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # in its row
        counts = np.fromiter(map(len, segments), np.int64, len(segments))
        table = np.fromiter(chain.from_iterable(chain.from_iterable(segments)), np.int64).reshape(-1, 4)
        start, stop, first, last = (table + np.repeat(np.arange(len(segments)), counts)[:, None] * _ROW).T

        own = np.searchsorted(start, begin, side="right") - 1  # the segment that begins at the token or before
        empty = np.flatnonzero((begin == end) & (own > 0))  # white space, cut off its token: it ends what is before
        own[empty] -= (start[own[empty]] == begin[empty]) & (stop[own[empty] - 1] == begin[empty])
        across = end > np.append(start, _LAST)[own + 1]  # what begins before a segment and ends in it
        own[across] += 1
        stops = np.append(stop, -1)[own]
        inside = np.flatnonzero(written & (end <= stops))
        opened, cut = np.zeros(len(table) + 1, bool), np.zeros(len(table) + 1, bool)
        opened[own[across]] = True
        cut[own[(begin < stops) & (end > stops)]] = True

        part = own[inside]
        shift = first[part] - start[part]
        begin = np.maximum(begin[inside] + shift, first[part])
        end = np.minimum(_behind_marks(texts, end[inside]) + shift, last[part])
        reached = np.maximum.accumulate(end)
        following = np.minimum.accumulate(begin[::-1])[::-1]
        reached[:-1][following[1:] < reached[:-1]] = -1
        closing = np.append(part[1:] != part[:-1], True)[: len(part)] & ~cut[part]
        reached[closing] = last[part[closing]]
        reached[:-1][reached[:-1] == reached[1:]] = -1  # of tokens without extent the last one ends the text
        kept = number < (len(flat) if max_length is None else max_length)
        return cls(flat, lengths, kept, flat == unknown_id, inside, last[part], opened[part], reached)

    def rows(self, values: Array) -> list[Array]:
        """An entry for each token [N] as rows, truncated."""
        starts = np.cumsum(self.lengths) - self.lengths
        counts = np.diff(np.append(0, np.cumsum(self.kept))[np.append(starts, len(self.kept))])
        return np.split(values[self.kept], np.cumsum(counts)[:-1])


def align(student: Tokens, teacher: Tokens, *, masked: Array | None = None) -> tuple[Array, Array]:
    """The chunk ids of all tokens on both sides [N].

    Args:
        masked: [N] whether a token of the student is masked, with its whole chunk.
    """
    sides = (student, teacher)
    ends = [np.flatnonzero((side.end >= 0) & side.kept[side.inside]) for side in sides]
    keys = [side.end[end] for side, end in zip(sides, ends, strict=True)]
    _, *both = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    closing = [end[chosen] for end, chosen in zip(ends, both, strict=True)]  # the last token of each chunk
    home = student.segment[closing[0]]
    first = np.append(True, home[1:] != home[:-1])[: len(home)]
    counted, chunks = np.ones(len(home) + 1, bool), []
    counted[-1] = False  # of the tokens in no chunk
    for side, last in zip(sides, closing, strict=True):
        chunk = np.searchsorted(last, np.arange(len(side.inside)))
        chunk[np.append(home, -1)[chunk] != side.segment] = len(home)
        out = side.unknown if side is teacher or masked is None else side.unknown | masked
        counted[chunk[out[side.inside]]] = False
        counted[:-1] &= ~(first & side.opened[last])
        chunks.append(chunk)
    before = np.cumsum(counted) - counted
    number = before[:-1] - before[np.searchsorted(home // _ROW, home // _ROW)]  # in the row
    number = np.where(counted, np.append(number, 0), NO_CHUNK)
    made = []
    for side, chunk in zip(sides, chunks, strict=True):
        ids = np.full(len(side.ids), NO_CHUNK, np.int64)
        ids[side.inside] = number[chunk]
        made.append(ids)
    return made[0], made[1]
