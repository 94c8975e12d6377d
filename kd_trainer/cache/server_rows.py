"""Top-k rows out of what a completions server returns: JSON in, the columns of the `topk` format out. No HTTP.

A request holds the token ids of one row. Entry i of `prompt_logprobs` is the distribution of token i given the tokens
before it, so it belongs to position i - 1; the last position of a row has none. An entry maps ids to log-probabilities:
the k largest, and the row's own token where it is not among them. Letters: S tokens of a row, N kept positions, V
classes, k classes kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..losses import TopK
from ..tasks import begins_next, token_mask
from ..validation import fail

# Log-probabilities of bfloat16 models sum to one within this; logits or scores do not.
_SUM_ERROR = 1e-2
_ROUNDING = 2.0**-24  # of a sum of probabilities in float32: a smaller rest cannot be told from none


class PromptRow(NamedTuple):
    """A row as it is sent."""

    ids: list[int]  # its tokens, without padding
    kept: list[int]  # kept positions, counted from its first token


class MalformedAnswer(ValueError):
    """An answer that is not what the protocol says; `expected` is what it has to be."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}; expected {expected}")
        self.found, self.expected = found, expected


def prompt_rows(inputs: Mapping[str, Any], mask: Tensor) -> list[PromptRow]:
    """The rows of a batch without their padding.

    Args:
        inputs: `input_ids` [B, S], and `attention_mask` and `position_ids` where the batch has them.
        mask: [B, S], the kept positions.

    Raises:
        ValueError: packed rows, an attention mask with gaps or of pairs of tokens, positions that do not count from 0,
            a kept last position: the server cannot compute what the live teacher would.
    """
    ids: Tensor = inputs["input_ids"]
    attention: Any = inputs.get("attention_mask")
    real = token_mask(attention)
    if real is not None and (attention.dim() > 2 or real.shape != ids.shape):
        expected = f"one number for each token, {list(ids.shape)}"
        _fail_batch("attention_mask", f"of shape {list(attention.shape)}", expected)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    if bool((begins_next(inputs, real) & real[:, 1:] & real[:, :-1]).any()):
        fail_packed()
    at = inputs.get("position_ids")
    if at is not None and at.dim() > 2:
        _fail_batch("position_ids", f"of shape {list(at.shape)}", "one number for each token")
    rows = []
    for row, (own, kept) in enumerate(zip(real, mask, strict=True)):
        places = own.nonzero().squeeze(1).tolist()
        if not places:
            rows.append(PromptRow([], []))
            continue
        tokens = slice(places[0], places[-1] + 1)
        if places != list(range(tokens.start, tokens.stop)):
            _fail_batch("attention_mask", f"one with a gap between the tokens of row {row} of a batch", "no gap")
        if at is not None and at.expand(ids.shape)[row, tokens].tolist() != list(range(len(places))):
            _fail_batch("position_ids", f"not counted from 0 in row {row} of a batch", "0, 1, 2, ... for its tokens")
        positions = (kept.nonzero().squeeze(1) - tokens.start).tolist()
        if positions and not 0 <= positions[0] <= positions[-1] < len(places) - 1:
            shown = f"one with a label for what follows the last token of row {row} of a batch"
            fix = "Add that token to the row, or mask the label."
            _fail_batch("labels", shown, "labels for tokens of the row", fix)
        rows.append(PromptRow(ids[row, tokens].tolist(), positions))
    return rows


def fail_packed() -> NoReturn:
    """ValueError: the batch has packed rows, which the server cannot run."""
    _fail_batch("data_collator", "one that packs several sequences into a row", "one sequence a row")


def _fail_batch(argument: str, shown: str, expected: str, fix: str = "") -> NoReturn:
    because = "teacher_server_url sends the token ids of one sequence alone"
    fix = fix or "Collate one plain sequence a row, or run the teacher itself."
    fail(argument, shown, expected, fix, because=because)


def top_k_of(answer: Any, row: PromptRow, k: int, classes: int) -> TopK:
    """The top k [N, k] and the log of the rest of the mass [N] at the kept positions of a row.

    Args:
        answer: of the server, as parsed from JSON.
        classes: V; an id from V on is an error.

    Returns:
        `TopK`, float32. The rest is 1 minus the mass of the k, at most (V - k) times the least of them.

    Raises:
        MalformedAnswer: an entry is missing, has the wrong number of ids, lacks the row's own token, or holds what is
            no log-probability.
    """
    entries = _entries(answer, row.ids)
    ids, log_probs = [], []
    for position in row.kept:
        own, entry = row.ids[position + 1], entries[position + 1]
        found = _sorted(entry, position + 1)
        own_value = next((value for i, value in found if i == own), None)
        if own_value is None:
            expected = f"the row's own token, {own}, among them: the server has to read the ids as they are sent"
            raise MalformedAnswer(f"log-probabilities for token {position + 1} without its id", expected)
        if len(found) not in (k, k + 1) or (len(found) == k + 1 and found[-1][1] < own_value):
            expected = f"the {k} largest, and that of the row's own token where it is not among them"
            raise MalformedAnswer(f"{len(found)} log-probabilities for token {position + 1}", expected)
        wrong = next((i for i, _ in found if not 0 <= i < classes), None)
        if wrong is not None:
            expected = f"ids below {classes:,}, the student's vocabulary"
            raise MalformedAnswer(f"the token id {wrong:,}", expected)
        ids.append([i for i, _ in found[:k]])
        log_probs.append([value for _, value in found[:k]])
    kept_ids = torch.tensor(ids, dtype=torch.int64).view(len(ids), k)
    values = torch.tensor(log_probs, dtype=torch.float64).view(len(ids), k)
    mass = values.exp().sum(-1)
    if len(mass) and float(mass.max()) > 1 + _SUM_ERROR:
        found_mass = f"values whose exponentials sum to {float(mass.max()):.4g}"
        raise MalformedAnswer(found_mass, "log-probabilities, whose exponentials sum to at most 1")
    most = math.log(classes - k) + values[:, -1]
    rest = (1 - mass).clamp(min=_ROUNDING).log().minimum(most)
    return TopK(kept_ids, values.float(), rest.float())


def _entries(answer: Any, ids: Sequence[int]) -> list[Any]:
    """`prompt_logprobs` of the only choice, one entry for each token."""
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise MalformedAnswer("no list 'choices' with one object", "a completion")
    entries = choices[0].get("prompt_logprobs")
    if not isinstance(entries, list):
        raise MalformedAnswer("no list 'prompt_logprobs'", "one, as vLLM returns it for the option prompt_logprobs")
    if len(entries) != len(ids):
        raise MalformedAnswer(f"prompt_logprobs of {len(entries)} tokens", f"{len(ids)}, those of the row")
    if entries[0] is not None:
        raise MalformedAnswer("log-probabilities for the first token", "null: nothing comes before it")
    return entries


def _sorted(entry: Any, token: int) -> list[tuple[int, float]]:
    """(id, log-probability), largest first; equal ones by id, so that the same answer is the same row."""
    if not isinstance(entry, Mapping) or not entry:
        raise MalformedAnswer(f"no log-probabilities for token {token}", "an object of ids")
    found = []
    for name, value in entry.items():
        number = value.get("logprob") if isinstance(value, Mapping) else None
        if not (isinstance(name, str) and name.isascii() and name.isdigit()) or not isinstance(number, (int, float)):
            raise MalformedAnswer(f"an entry for token {token} that is no id with a logprob", '{"id": {"logprob": x}}')
        if math.isnan(number) or number > _SUM_ERROR:
            raise MalformedAnswer(f"the log-probability {number} for token {token}", "a number of at most 0")
        found.append((int(name), min(float(number), 0.0)))
    return sorted(found, key=lambda each: (-each[1], each[0]))


def decoded_tokens(answer: Any) -> dict[int, str]:
    """The texts of the tokens in an answer, by id, where the server adds them."""
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    pairs = ((name, value.get("decoded_token")) for entry in entries for name, value in entry.items())
    return {int(name): text for name, text in pairs if isinstance(text, str)}
