"""Packed rows with "batchmean" are refused in every batch, and padding is not taken for packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

from kd_trainer import DistillationTrainer
from kd_trainer.tasks.inputs import is_packed
from kd_trainer.tasks.packing import PackingWatch
from tests.helpers import tiny

REFUSED = r"`kd_reduction` is 'batchmean'; expected 'tokenmean' with packed batches"


def column(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


PADDED: dict[str, dict[str, torch.Tensor]] = {
    "left, 1 at padding": {"position_ids": column([1, 1, 0, 1, 2]), "attention_mask": column([0, 0, 1, 1, 1])},
    "left, 0 at padding": {"position_ids": column([0, 0, 0, 1, 2]), "attention_mask": column([0, 0, 1, 1, 1])},
    "left, -1 at padding": {"position_ids": column([-1, -1, 0, 1, 2]), "attention_mask": column([0, 0, 1, 1, 1])},
    "right, 1 at padding": {"position_ids": column([0, 1, 2, 1, 1]), "attention_mask": column([1, 1, 1, 0, 0])},
    "right, 0 at padding": {"position_ids": column([0, 1, 2, 0, 0]), "attention_mask": column([1, 1, 1, 0, 0])},
    "right, last at padding": {"position_ids": column([0, 1, 2, 2, 2]), "attention_mask": column([1, 1, 1, 0, 0])},
    "left, without a mask": {"position_ids": column([1, 1, 0, 1, 2])},
    "left, 0, without a mask": {"position_ids": column([0, 0, 0, 1, 2])},
    "right, without a mask": {"position_ids": column([0, 1, 2, 1, 1])},
    "right, 0, without a mask": {"position_ids": column([0, 1, 2, 0, 0])},
    "a hole in the mask": {"position_ids": column([0, 1, 1, 2, 3]), "attention_mask": column([1, 1, 0, 1, 1])},
    "a row like any other": {"position_ids": column([0, 1, 2, 3, 4])},
    "later positions": {"position_ids": column([7, 8, 9, 10, 11]), "attention_mask": column([1] * 5)},
    "one sequence of seq_idx": {"seq_idx": column([0, 0, 0, 0, 0])},
    "one sequence of seq_idx, padded": {"seq_idx": column([3, 3, 3, -1, -1])},
    "one sequence of cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 5])},
    "multimodal positions": {"position_ids": torch.tensor([[[0, 0, 0, 1, 2]]] * 3)},
    "a 4D mask": {"attention_mask": torch.ones(1, 1, 5, 5).tril().bool()},
    "a sliding window": {"attention_mask": torch.ones(1, 1, 5, 5).tril().triu(-1).bool()},
}
PACKED: dict[str, dict[str, torch.Tensor]] = {
    "positions": {"position_ids": column([0, 1, 0, 1, 2])},
    "positions and a full mask": {"position_ids": column([0, 1, 0, 1, 2]), "attention_mask": column([1] * 5)},
    "positions and padding": {"position_ids": column([0, 1, 0, 1, 0]), "attention_mask": column([1, 1, 1, 1, 0])},
    "positions and padding without a mask": {"position_ids": column([0, 1, 0, 1, 0])},
    "padding on the left": {"position_ids": column([1, 0, 1, 0, 1]), "attention_mask": column([0, 1, 1, 1, 1])},
    "positions that start at 3": {"position_ids": column([3, 4, 5, 3, 4])},
    "positions of one dimension": {"position_ids": torch.tensor([0, 1, 0, 1, 2])},
    "text positions beside multimodal ones": {"position_ids": torch.tensor([[[0, 1, 0, 1, 2]]] * 4)},
    "seq_idx": {"seq_idx": column([0, 0, 1, 1, 1])},
    "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 2, 5])},
    "blocks of a 4D mask": {
        "attention_mask": torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()[None, None]
    },
    "a sequence of one token": {"position_ids": column([0, 1, 2, 3, 0]), "attention_mask": column([1] * 5)},
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_no_packing(name):
    assert not is_packed(PADDED[name], (1, 5))


@pytest.mark.parametrize("name", PACKED)
def test_packing_is_seen(name):
    assert is_packed(PACKED[name], (1, 5))


def test_one_row_of_positions_for_all_rows():
    mask = torch.ones(3, 5, dtype=torch.long)
    for positions, packed in (([0, 1, 2, 3, 4], False), ([0, 1, 0, 1, 2], True)):
        for given in ({"position_ids": column(positions)}, {"position_ids": torch.tensor(positions)}):
            assert bool(is_packed({**given, "attention_mask": mask}, (3, 5))) == packed
            assert bool(is_packed(given, (3, 5))) == packed


def test_one_packed_row_among_others():
    positions = column([0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [1, 1, 0, 1, 2])
    mask = column([1] * 5, [1] * 5, [0, 0, 1, 1, 1])
    assert is_packed({"position_ids": positions, "attention_mask": mask}, (3, 5))
    assert not is_packed({"position_ids": positions[::2], "attention_mask": mask[::2]}, (2, 5))


# ---- in a training ----


def apart(features: list[dict]) -> dict[str, torch.Tensor]:
    """Padded on the left, with the positions that transformers' scripts make."""
    width, batch = max(len(f["input_ids"]) for f in features), {"input_ids": [], "attention_mask": [], "labels": []}
    for row in features:
        ids = torch.as_tensor(row["input_ids"])
        ends = (width - len(ids), 0)
        for name, value, fill in (
            ("input_ids", ids, 0),
            ("attention_mask", torch.ones_like(ids), 0),
            ("labels", ids, -100),
        ):
            batch[name].append(F.pad(value, ends, value=fill))
    made = {name: torch.stack(column) for name, column in batch.items()}
    places = made["attention_mask"].cumsum(-1) - 1
    return {**made, "position_ids": places.masked_fill(made["attention_mask"] == 0, 1)}


class Then:
    """One collator for the first batches, then another."""

    def __init__(self, count: int, first: Any, later: Any) -> None:
        self.count, self.first, self.later = count, first, later

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        self.count -= 1
        return (self.first if self.count >= 0 else self.later)(features)


def trainer(output_dir: Any, collator: Any, **kwargs: Any) -> DistillationTrainer:
    torch.manual_seed(0)
    pair = [LlamaForCausalLM(tiny.llama_config(h)) for h in (16, 24)]
    made = tiny.trainer("causal_lm", output_dir, pair=pair, per_device_train_batch_size=4, **kwargs)
    made.data_collator = collator
    return made


FLATTENING = [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True, "return_position_ids": False}]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("given", FLATTENING, ids=lambda given: " ".join(given) or "position_ids")
def test_a_later_packed_batch_is_refused(given, accumulation, tmp_path):
    collator = Then(3, apart, DataCollatorWithFlattening(**given))
    packed = trainer(tmp_path, collator, gradient_accumulation_steps=accumulation, max_steps=6)
    with pytest.raises(ValueError, match=REFUSED):
        packed.train()
    assert packed.state.global_step == (3 if accumulation == 1 else 1)


def test_padded_batches_with_positions_are_not_refused(tmp_path):
    padded = trainer(tmp_path, apart)
    padded.train()
    padded.evaluate()
    assert len(tiny.logged(padded, "loss")) == 4
    assert [row.status for row in padded.check(evaluate=False) if row.what == "reduction"] == ["warning"]


def test_packed_evaluation_is_refused(tmp_path):
    packed = trainer(tmp_path, DataCollatorWithFlattening())
    with pytest.raises(ValueError, match=REFUSED):
        packed.evaluate()
    fine = trainer(tmp_path, DataCollatorWithFlattening(), kd_reduction="tokenmean")
    assert "eval_loss" in fine.evaluate()


def test_on_accelerators_the_answer_waits_for_the_next_log():
    """A 0-dim tensor of a device that is not the CPU is kept unread: a step would wait for it."""
    watch = PackingWatch()

    class Far(torch.Tensor):
        read = False

        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

        def __bool__(self) -> bool:
            type(self).read = True
            return super().__bool__()

    yes, no = (torch.tensor(value).as_subclass(Far) for value in (True, False))
    for packed in (no, yes, no):
        watch.see(packed)
    assert not Far.read
    with pytest.raises(ValueError, match=REFUSED):
        watch.raise_noted()
    watch.raise_noted()  # raised once
    with pytest.raises(ValueError, match=REFUSED):
        watch.see(yes, now=True)
    watch.see(no, now=True)
    watch.see(False)
    with pytest.raises(ValueError, match=REFUSED):
        watch.see(True)
