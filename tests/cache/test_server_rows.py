"""What is sent of a batch, and the top-k rows out of an answer; whatever is not as the protocol has it is an error."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch

from kd_trainer.cache.server_rows import MalformedAnswer, PromptRow, prompt_rows, top_k_of
from kd_trainer.losses import top_k
from kd_trainer.losses.sparse_targets import top_k_divergence
from tests.helpers import tiny
from tests.helpers.completions_server import CompletionsServer

IDS = [3, 7, 2, 9, 4]
ROW = PromptRow(IDS, [0, 2, 3])
V = tiny.VOCAB


@pytest.fixture(scope="module")
def teacher():
    return tiny.models("causal_lm")[1]


def answer_of(teacher: Any, k: int) -> Any:
    """As it comes over the network."""
    server = CompletionsServer(teacher)
    server.http.server_close()
    return json.loads(json.dumps(server.completion({"prompt": IDS, "prompt_logprobs": k})))


def logits(teacher: Any) -> torch.Tensor:
    with torch.no_grad():
        return teacher(input_ids=torch.tensor([IDS])).logits[0]


# ---- the rows ----


@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_the_top_k_are_those_of_the_logits(k, teacher):
    """In float64 by hand: the largest, their order, and the mass of the rest."""
    found = top_k_of(answer_of(teacher, k), ROW, k, V)
    log_probs = logits(teacher)[ROW.kept].double().log_softmax(-1)
    largest = log_probs.topk(k)
    assert torch.equal(found.ids, largest.indices)
    torch.testing.assert_close(found.log_probs.double(), largest.values, atol=1e-6, rtol=1e-6)
    rest = log_probs.scatter(-1, largest.indices, -torch.inf).exp().sum(-1)
    torch.testing.assert_close(found.log_tail.double().exp(), rest, atol=1e-6, rtol=0)


def test_all_but_one_class_give_the_live_divergence(teacher):
    """The rest is the last class then: forward and reverse KL are the dense ones to 1e-5."""
    found = top_k_of(answer_of(teacher, V - 1), ROW, V - 1, V)
    p, z = (
        logits(teacher)[ROW.kept].double().log_softmax(-1),
        torch.randn(3, V, generator=torch.Generator().manual_seed(0)),
    )
    q = z.double().log_softmax(-1)
    for name, (a, b) in {"forward_kl": (p, q), "reverse_kl": (q, p)}.items():
        dense = (a.exp() * (a - b)).sum(-1)
        sparse = top_k_divergence(z, found, divergence=name)
        torch.testing.assert_close(sparse.double(), dense, atol=1e-5, rtol=1e-5)


def test_the_rest_is_bounded_where_the_sum_has_no_digits_left():
    """1 - sum is 0 in float64, and a student with mass elsewhere must not be infinitely far away."""
    entry = {"3": {"logprob": 0.0}, "7": {"logprob": -30.0}}
    found = top_k_of({"choices": [{"prompt_logprobs": [None, entry]}]}, PromptRow([1, 3], [0]), 2, V)
    assert found.log_tail.item() == pytest.approx(math.log(V - 2) - 30.0)
    entry = {"3": {"logprob": -1e-9}, "7": {"logprob": -9.0}}
    found = top_k_of({"choices": [{"prompt_logprobs": [None, entry]}]}, PromptRow([1, 3], [0]), 2, V)
    assert found.log_tail.item() == pytest.approx(-24 * math.log(2))
    entry = {"3": {"logprob": 0.0}, "7": {"logprob": -math.inf}}
    found = top_k_of({"choices": [{"prompt_logprobs": [None, entry]}]}, PromptRow([1, 3], [0]), 2, V)
    assert found.log_tail.item() == -math.inf


def test_the_token_outside_of_the_top_k_is_not_kept(teacher):
    answer = answer_of(teacher, 2)
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    assert {len(entry) for entry in entries} == {2, 3} or {len(entry) for entry in entries} == {3}
    kept = top_k(logits(teacher)[ROW.kept], 2)
    assert torch.equal(top_k_of(answer, ROW, 2, V).ids, kept.ids)


def test_equal_log_probabilities_are_ordered_by_id():
    names = ["9", "4", "30", "11"]
    found = []
    for order in (names, names[::-1]):
        entry = {name: {"logprob": -2.0} for name in order}
        answer = {"choices": [{"prompt_logprobs": [None, entry]}]}
        found.append(top_k_of(answer, PromptRow([1, 9], [0]), 3, V).ids.tolist())
    assert found[0] == found[1] == [[4, 9, 11]]


def _entry(change: Any) -> Any:
    def apply(answer: Any) -> None:
        change(answer["choices"][0]["prompt_logprobs"])

    return apply


def _first(entry: dict[str, Any]) -> dict[str, Any]:
    return next(iter(entry.values()))


FOUR = {name: {"logprob": value} for name, value in {"9": -0.9, "1": -1.5, "2": -2.5, "3": -9.0}.items()}
MALFORMED = {
    "no object": (lambda a: a.clear(), "no list 'choices'"),
    "two choices": (lambda a: a["choices"].append({}), "no list 'choices' with one object"),
    "no log-probabilities": (lambda a: a["choices"][0].pop("prompt_logprobs"), "no list 'prompt_logprobs'"),
    "a short row": (_entry(lambda e: e.pop()), "prompt_logprobs of 4 tokens; expected 5"),
    "a long row": (_entry(lambda e: e.append(e[1])), "prompt_logprobs of 6 tokens; expected 5"),
    "a first entry": (_entry(lambda e: e.__setitem__(0, e[1])), "for the first token; expected null"),
    "a missing entry": (_entry(lambda e: e.__setitem__(3, None)), "no log-probabilities for token 3"),
    "NaN": (_entry(lambda e: _first(e[1]).update(logprob=math.nan)), "the log-probability nan for token 1"),
    "a positive one": (_entry(lambda e: _first(e[1]).update(logprob=1.5)), "the log-probability 1.5 for token 1"),
    "null": (_entry(lambda e: _first(e[1]).update(logprob=None)), "no id with a logprob"),
    "a text": (_entry(lambda e: e[1].update({"the": {"logprob": -1.0}})), "no id with a logprob"),
    "too few": (_entry(lambda e: [e[3].pop(name) for name in list(e[3])[1:]]), "1 log-probabilities for token 3"),
    "too many": (_entry(lambda e: e[3].update({str(i): {"logprob": -9.0} for i in range(V)})), "37 log-probabilities"),
    "not the row's token": (_entry(lambda e: e[3].pop("9")), "for token 3 without its id"),
    "k + 1 with the row's token among the k": (_entry(lambda e: e.__setitem__(3, FOUR)), "4 log-probabilities for tok"),
    "a foreign id": (_entry(lambda e: e[3].update({"37": e[3].pop(_other(e[3]))})), "the token id 37; expected ids"),
    "logits": (_entry(lambda e: [x.update(logprob=-0.01) for x in e[3].values()]), "whose exponentials sum to"),
}  # fmt: skip


def _other(entry: dict[str, Any]) -> str:
    return next(name for name in entry if name != "9")


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_answer(name, teacher):
    change, words = MALFORMED[name]
    answer = answer_of(teacher, 3)
    change(answer)
    with pytest.raises(MalformedAnswer, match=re.escape(words)):
        top_k_of(answer, ROW, 3, V)


@pytest.mark.parametrize(
    "answer", [None, [], "x", {"choices": {}}, {"choices": [[]]}, {"choices": [{"prompt_logprobs": {}}]}]
)
def test_an_answer_of_another_type(answer):
    with pytest.raises(MalformedAnswer):
        top_k_of(answer, ROW, 3, V)


# ---- what is sent ----


def batch(**more: Any) -> dict[str, Any]:
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 1, 2, 0], [3, 4, 5, 6, 7]])
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": attention, **more}


MASK = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()


def test_rows_are_sent_without_padding_on_either_side():
    expected = [PromptRow([5, 6, 7], [0, 1]), PromptRow([8, 9, 1, 2], [0, 2]), PromptRow([3, 4, 5, 6, 7], [])]
    assert prompt_rows(batch(), MASK) == expected
    positions = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    assert prompt_rows(batch(position_ids=positions), MASK) == expected
    whole = {"input_ids": batch()["input_ids"][2:]}
    assert prompt_rows(whole, MASK[1:2]) == [PromptRow([3, 4, 5, 6, 7], [0, 2])]
    empty = {**whole, "attention_mask": torch.zeros(1, 5, dtype=torch.long)}
    assert prompt_rows(empty, MASK[2:]) == [PromptRow([], [])]


@pytest.mark.parametrize(
    ("more", "mask", "words"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1]] * 3)}, MASK, "packs several sequences into a row"),
        ({"position_ids": torch.tensor([[1, 2, 3, 4, 5]] * 3)}, MASK, "`position_ids` is not counted from 0 in row 0"),
        ({"position_ids": torch.zeros(3, 3, 5)}, MASK, "`position_ids` is of shape [3, 3, 5]"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]] * 3)}, MASK, "a gap between the tokens of row 0"),
        ({"attention_mask": torch.ones(3, 1, 5, 5).tril()}, MASK, "`attention_mask` is of shape [3, 1, 5, 5]"),
        ({}, torch.ones(3, 5).bool(), "expected labels for tokens of the row"),
    ],
)
def test_what_a_server_cannot_compute_is_refused(more, mask, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        prompt_rows(batch(**more), mask)
