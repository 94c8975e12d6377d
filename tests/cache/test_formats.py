"""What a cache keeps of a teacher's output comes back within the stated errors, in the stated number of bytes."""

from __future__ import annotations

import pytest
import torch

from kd_trainer.cache.formats import (
    SPARSE,
    Format,
    check_format,
    decode,
    encode,
    output,
    room_for,
    to_numpy,
)
from kd_trainer.losses.sparse_targets import Samples, TopK, draw_samples, top_k

N, V = 40, 1000


def outputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))).to(dtype)


def encoded(kept: Format, values: torch.Tensor, uniform: torch.Tensor) -> dict[str, torch.Tensor]:
    columns = room_for(kept, len(values), values)
    encode(kept, values, uniform, columns)
    return columns


def there_and_back(kept: Format, values: torch.Tensor, head: dict | None = None):
    columns = {name: to_numpy(c) for name, c in encoded(kept, values, torch.linspace(0, 0.99, len(values))).items()}
    assert all(column.shape[0] == len(values) and column.ndim == 2 for column in columns.values())
    tensors = decode(kept, columns)
    assert not any(tensor.is_floating_point() for tensor in tensors.values()), "a backend would cast it"
    size = sum(column.nbytes for column in columns.values()) / len(values)
    return output(kept, tensors, head or {}), size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_and_hidden_are_exact_in_their_own_dtype(dtype):
    values = outputs(dtype=getattr(torch, dtype))
    kept = Format("logits", V, dtype=dtype)
    found, size = there_and_back(kept, values)
    assert torch.equal(found.logits, values)
    assert size == kept.bytes_a_position() == V * values.element_size()
    kept = Format("hidden", V, dtype=dtype)
    found, size = there_and_back(kept, values[:, :24], {"teacher_weight": torch.zeros(V, 24, dtype=values.dtype)})
    assert torch.equal(found.hidden, values[:, :24])
    assert size == kept.bytes_a_position(24)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_logits_in_half_precision_have_the_stated_error(dtype, error):
    found, _ = there_and_back(Format("logits", V, dtype=dtype), outputs())
    assert ((found.logits.float() - outputs()).abs() <= error * outputs().abs() + 1e-7).all()


@pytest.mark.parametrize("classes", [2, 256, 65_535, 65_536, 65_537, 151_936])
@pytest.mark.parametrize("name", SPARSE)
def test_the_last_id_of_any_vocabulary_comes_back(name, classes):
    kept = Format(name, classes, 1, 1.0, "float16")
    values = torch.zeros(3, classes)
    values[0, 0] = values[1, -1] = values[2, classes // 2] = 80.0
    found, size = there_and_back(kept, values)
    assert found.sparse.ids.flatten().tolist() == [0, classes - 1, classes // 2]
    assert size == kept.bytes_a_position()


@pytest.mark.parametrize("k", [1, 7, 64])
def test_top_k_has_the_stated_errors_and_sums_to_one(k):
    kept = Format("topk", V, k, 2.0, "float16")
    exact = top_k(outputs(), k, temperature=2.0)
    found, size = there_and_back(kept, outputs())
    assert isinstance(found.sparse, TopK)
    assert torch.equal(found.sparse.ids.long(), exact.ids)
    rounding = 2**-11 * exact.log_probs.abs() + 2**-11 * exact.log_tail.abs().unsqueeze(-1) + 1e-3
    assert ((found.sparse.log_probs - exact.log_probs).abs() <= rounding).all()
    total = found.sparse.log_probs.exp().sum(-1) + found.sparse.log_tail.exp()
    torch.testing.assert_close(total, torch.ones(N))
    assert size == kept.bytes_a_position()


def test_classes_without_any_probability():
    values = outputs()
    values[3, 5:] = -torch.inf
    found, _ = there_and_back(Format("topk", V, 64, 1.0, "float16"), values)
    torch.testing.assert_close(found.sparse.log_probs[3].exp().sum(), torch.tensor(1.0))


def test_samples_come_back_as_they_were_drawn():
    kept = Format("sampled", V, 50, 3.0)
    exact = draw_samples(outputs(), 50, temperature=3.0, uniform=torch.linspace(0, 0.99, N))
    found, size = there_and_back(kept, outputs())
    assert isinstance(found.sparse, Samples)
    assert torch.equal(found.sparse.ids.long(), exact.ids)
    assert torch.equal(found.sparse.top.long(), exact.top)
    assert torch.equal(found.sparse.entropy, exact.entropy.float())
    assert size == kept.bytes_a_position()


def test_the_sizes_that_are_promised():
    """Bytes a token: top-k of 64 at most 260 up to 65,536 ids and 400 above; 50 samples at most 210."""
    draw = torch.Generator().manual_seed(0)
    for kept, size in (
        (Format("topk", 50_257, 64, 1.0, "float16"), 258),
        (Format("topk", 151_936, 64, 1.0, "float16"), 386),
        (Format("sampled", 50_257, 50, 1.0), 106),
        (Format("sampled", 151_936, 50, 1.0), 208),
    ):
        values = 4 * torch.randn(4, kept.classes, generator=draw)
        assert there_and_back(kept, values)[1] == kept.bytes_a_position() == size
    assert Format("hidden", 151_936, dtype="bfloat16").bytes_a_position(1536) == 3072


@pytest.mark.parametrize("name", SPARSE)
def test_no_positions_at_all(name):
    found, _ = there_and_back_empty(Format(name, V, 5, 1.0, "float16"))
    assert found.sparse.ids.shape == (0, 5)


def there_and_back_empty(kept: Format):
    columns = {name: to_numpy(column) for name, column in encoded(kept, torch.empty(0, V), torch.empty(0)).items()}
    return output(kept, decode(kept, columns), {}), 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("topk", None, "float16", False, False, "regression"), "`teacher_cache_format` is 'topk'; expected 'logits'"),
        (("hidden", None, "float32", True, False, "classification"), "where the task is no language model's"),
        (("logits", 5, "float32", True, True, "causal_lm"), "`teacher_cache_k` is 5; expected no value"),
        (("topk", None, "uint8", True, True, "causal_lm"), "`teacher_cache_dtype` is 'uint8'; expected one of"),
        (("sampled", None, "float16", True, True, "causal_lm"), "no value with teacher_cache_format 'sampled'"),
        (("topk", None, "bfloat16", True, True, "causal_lm"), "expected 'float16' or 'float32' with teacher_cache_fo"),
        (("top-k", None, "float32", True, True, "causal_lm"), "Did you mean `topk`?"),
    ],
)
def test_formats_that_do_not_fit_are_refused(given, message):
    name, k, dtype, softmax, over_tokens, task = given
    with pytest.raises(ValueError, match="teacher_cache") as error:
        check_format(name, k, dtype, softmax=softmax, over_tokens=over_tokens, task=task)
    assert message in str(error.value)
