"""How many rows a batch has: as its student's input has, wherever that stands among broadcast or flattened columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kd_trainer import DistillationTrainer
from kd_trainer.diagnostics.batch_changes import pieces_of
from kd_trainer.tasks.inputs import main_input
from kd_trainer.tasks.kinds import TASKS
from kd_trainer.training.objective import Objective
from tests.helpers import tiny

ROWS, WIDTH = 8, 6
IDS = torch.randint(3, tiny.VOCAB, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)

# Columns that may stand before the input, none of which has an entry for each row.
BEFORE: dict[str, dict[str, Any]] = {
    "positions for all rows": {"position_ids": torch.arange(WIDTH)[None]},
    "positions of one dimension": {"position_ids": torch.arange(WIDTH)},
    "multimodal positions": {"position_ids": torch.zeros(3, ROWS, WIDTH, dtype=torch.long)},
    "rope deltas": {"rope_deltas": torch.zeros(1, 1)},
    "flash attention": {"cu_seq_lens_q": torch.tensor([0, 3, 6]), "max_length_q": 3},
    "a number": {"max_length_q": torch.tensor(3)},
    "cache positions": {"cache_position": torch.arange(WIDTH)},
    "a mask for all rows": {"attention_mask": torch.ones(1, 1, WIDTH, WIDTH, dtype=torch.bool).tril()},
    "patches": {"pixel_values": torch.zeros(40, 12), "image_grid_thw": torch.ones(3, 3)},
    "images": {"pixel_values": torch.zeros(3, 3, 8, 8)},
    "a head mask": {"head_mask": torch.ones(1, 2)},
    "the teacher's": {"teacher_input_ids": torch.ones(3, 4), "teacher_cache_ids": torch.ones(9, 2)},
    "an unknown vector": {"class_weights": torch.ones(5)},
}
INPUT = {
    "input_ids": IDS,
    "inputs_embeds": torch.zeros(ROWS, WIDTH, 4),
    "features": torch.zeros(ROWS, 7),
    "x": torch.zeros(ROWS, 7),
    "pixel_values": torch.zeros(ROWS, 3, 8, 8),
    "input_values": torch.zeros(ROWS, 90),
}


_IMAGES = ("patches", "images")  # of a model that reads tokens; alone they are the input
PAIRS = [(before, name) for before in BEFORE for name in INPUT if before not in _IMAGES or name[:6] == "input_"]
PAIRS = [(before, name) for before, name in PAIRS if before not in _IMAGES or name != "input_values"]


@pytest.mark.parametrize(("before", "name"), PAIRS)
def test_the_input_is_found_behind_anything(before, name):
    columns = BEFORE[before]
    batch = {**columns, name: INPUT[name]}
    assert main_input(batch) is INPUT[name]
    assert main_input({"nested": [columns, {name: INPUT[name]}]}) is INPUT[name]
    assert Objective(0.5, 1.0).count(TASKS["classification"], batch).rows == ROWS


def test_rows_of_flattened_patches_alone():
    grid = torch.ones(4, 3)
    assert main_input({"pixel_values": torch.zeros(40, 12), "image_grid_thw": grid}) is grid


def test_one_row_stays_one_row():
    batch = {"weights": torch.ones(5), "x": torch.zeros(1, 7), "y": torch.zeros(1, 2)}
    assert main_input(batch) is batch["x"]
    assert main_input({"attention_mask": MASK}) is MASK


def llamas() -> tuple:
    torch.manual_seed(0)
    return tuple(LlamaForCausalLM(tiny.llama_config(h)) for h in (16, 24))


def loss(pair: tuple, batch: dict, output_dir: Any, **kwargs: Any) -> float:
    trainer = DistillationTrainer(
        model=pair[0].eval(), teacher_model=pair[1], args=tiny.arguments(output_dir, **kwargs)
    )
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize("way", ["full", "fused"])
@pytest.mark.parametrize("before", ["positions for all rows", "positions of one dimension", "a mask for all rows"])
def test_the_loss_does_not_depend_on_the_order_of_columns(before, way, tmp_path):
    columns = dict(BEFORE[before])
    if before == "positions of one dimension":
        columns = {"position_ids": columns["position_ids"][None]}
    settings = {"kd_alpha": 1.0, "kd_loss_implementation": way, "kd_positions": "attended"}
    last = {"input_ids": IDS, **({} if "attention_mask" in columns else {"attention_mask": MASK}), **columns}
    first = {**columns, **last}
    expected = loss(llamas(), {"input_ids": IDS, "attention_mask": MASK}, tmp_path, **settings)
    assert next(iter(first)) != next(iter(last))
    assert loss(llamas(), last, tmp_path, **settings) == pytest.approx(expected, rel=1e-6)
    assert loss(llamas(), first, tmp_path, **settings) == pytest.approx(expected, rel=1e-6)


def test_the_router_loss_is_weighed_by_rows(tmp_path):
    def pair() -> tuple:
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=1.0,
            max_position_embeddings=32,
        )  # fmt: skip
        return MixtralForCausalLM(config), MixtralForCausalLM(config)

    places = {"position_ids": torch.arange(WIDTH)[None]}
    found = [
        loss(pair(), batch, tmp_path, kd_alpha=1.0)
        for batch in ({"input_ids": IDS, **places}, {**places, "input_ids": IDS})
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_batch_with_positions_for_all_rows_is_cut_into_rows(tmp_path):
    batch = {"position_ids": torch.arange(WIDTH)[None], "input_ids": IDS, "attention_mask": MASK}
    pieces = pieces_of(batch, 3)
    assert [len(piece["input_ids"]) for piece in pieces] == [3, 3, 2]
    assert all(piece["position_ids"] is batch["position_ids"] for piece in pieces)
    pair = llamas()
    trainer = DistillationTrainer(
        model=pair[0], teacher_model=pair[1], train_dataset=list(IDS), args=tiny.arguments(tmp_path, kd_alpha=1.0),
        data_collator=lambda rows: {"position_ids": torch.arange(WIDTH)[None], "input_ids": torch.stack(rows)},
    )  # fmt: skip
    found = {row.what: row for row in trainer.check(evaluate=False)}
    assert found["split"].status == "ok", found["split"]
    assert "2 x 4" in found["split"].found
