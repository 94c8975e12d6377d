"""Packed and padding-free batches of causal language models: the same run as rows with padding, for both models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    GPT2Config,
    LlamaForCausalLM,
    MistralConfig,
)

from kd_trainer.tasks.kinds import TASKS
from tests.helpers import tiny

STEPS = {"max_steps": 20, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
KEYS = ("loss", "soft_loss", "hard_loss", "teacher_agreement")
FLATTENING: dict[str, dict[str, Any]] = {
    "position_ids": {},
    "flash kwargs": {"return_flash_attn_kwargs": True},
    "seq_idx": {"return_seq_idx": True},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


def pair(attention: str = "sdpa") -> tuple:
    torch.manual_seed(0)
    return tuple(LlamaForCausalLM(tiny.llama_config(h, attn_implementation=attention)) for h in (16, 24))


def run(output_dir, collator, positions: str = "labels", attention: str = "sdpa", data=None, **kwargs):
    trainer = tiny.trainer(
        "causal_lm", output_dir, pair=pair(attention), data=tiny.rows("causal_lm", 80) if data is None else data,
        kd_reduction="tokenmean", kd_positions=positions, **{**STEPS, **kwargs},
    )  # fmt: skip
    trainer.data_collator = collator
    trainer.train()
    return trainer


def assert_same_run(packed, apart) -> None:
    for key in KEYS:
        assert tiny.logged(packed, key) == pytest.approx(tiny.logged(apart, key), rel=1e-5), key
    torch.testing.assert_close(tiny.weights(packed.model), tiny.weights(apart.model), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def apart_runs(tmp_path_factory):
    """The runs on rows with padding, each made once."""
    made: dict[tuple[str, str], Any] = {}

    def get(positions: str = "labels", attention: str = "sdpa"):
        key = (positions, attention)
        if key not in made:
            trainer = run(tmp_path_factory.mktemp("apart"), tiny.pad, positions, attention)
            made[key] = trainer, trainer.evaluate()
        return made[key]

    return get


@pytest.mark.parametrize("positions", ["labels", "attended"])
@pytest.mark.parametrize(("kind", "attention"), [*((kind, "sdpa") for kind in FLATTENING), ("position_ids", "eager")])
def test_packed_equals_unpacked(kind, attention, positions, apart_runs, tmp_path):  # trap 41
    apart, expected = apart_runs(positions, attention)
    packed = run(tmp_path, DataCollatorWithFlattening(**FLATTENING[kind]), positions, attention)
    assert_same_run(packed, apart)
    metrics = packed.evaluate()
    for key in KEYS:
        assert metrics[f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-5)


def test_without_labels(tmp_path):
    """The flattening collator makes labels of its own, the other batch has none: the same positions count."""
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in tiny.rows("causal_lm", 80)]
    apart = run(tmp_path, tiny.pad, "attended", data=rows, kd_alpha=1.0)
    packed = run(tmp_path, DataCollatorWithFlattening(), "attended", data=rows, kd_alpha=1.0)
    for key in ("loss", "soft_loss"):
        assert tiny.logged(packed, key) == pytest.approx(tiny.logged(apart, key), rel=1e-5)
    torch.testing.assert_close(tiny.weights(packed.model), tiny.weights(apart.model), rtol=0, atol=1e-5)


def bins(features: list[dict]) -> list[list[dict]]:
    return [features[:1], features[1:]]


def pack_in_bins(features: list[dict]) -> dict[str, torch.Tensor]:
    """As TRL packs: rows of concatenated sequences with position_ids that start again, padded at their end."""
    batch: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in bins(features):
        batch["input_ids"].append(torch.cat([torch.as_tensor(f["input_ids"]) for f in row]))
        batch["labels"].append(torch.cat([torch.as_tensor([-100, *f["labels"][1:]]) for f in row]))
        batch["position_ids"].append(torch.cat([torch.arange(len(f["input_ids"])) for f in row]))
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    stack = torch.nn.utils.rnn.pad_sequence
    return {k: stack(v, batch_first=True, padding_value=fill[k]) for k, v in batch.items()}


def test_several_packed_rows_equal_unpacked(apart_runs, tmp_path):
    assert_same_run(run(tmp_path, pack_in_bins), apart_runs()[0])


def test_accumulated_packed_batches_equal_unpacked(apart_runs, tmp_path):
    """Of unequal length, so that micro-batches have unequal numbers of tokens."""
    packed = run(tmp_path, DataCollatorWithFlattening(), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same_run(packed, apart_runs()[0])


@pytest.mark.parametrize("kind", FLATTENING)
def test_both_models_get_the_columns(kind, tmp_path):  # trap 22
    trainer = tiny.trainer("causal_lm", tmp_path, pair=pair(), kd_reduction="tokenmean", max_steps=1,
                           remove_unused_columns=True)  # fmt: skip
    trainer.data_collator = DataCollatorWithFlattening(**FLATTENING[kind])
    batch = trainer.data_collator(tiny.rows("causal_lm", 8))
    seen: dict[str, dict] = {}
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        model.register_forward_pre_hook(lambda m, a, k, name=name: seen.update({name: k}), with_kwargs=True)
    trainer.train()
    names = set(batch) - {"labels"}
    if "seq_idx" in names:  # read by state-space models, whose forward names it: Llama's does not
        names.remove("seq_idx")
    assert len(names) >= 2
    for name in ("student", "teacher"):
        assert names <= set(seen[name])
        assert torch.equal(torch.as_tensor(seen[name]["position_ids"]), batch["position_ids"])
    trainer.evaluate()


@pytest.mark.parametrize("config", [
    GPT2Config(vocab_size=tiny.VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=128, resid_pdrop=0.0,
               embd_pdrop=0.0, attn_pdrop=0.0),
    MistralConfig(vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                  num_attention_heads=2, num_key_value_heads=2, sliding_window=4),
], ids=lambda config: config.model_type)  # fmt: skip
def test_other_architectures(config, tmp_path):
    """Learned positions; a sliding window, which must not look into the sequence before."""
    runs = []
    for collator in (DataCollatorWithFlattening(), tiny.pad):
        torch.manual_seed(0)
        models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
        for model in models:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        trainer = tiny.trainer(
            "causal_lm", tmp_path, pair=models, data=tiny.rows("causal_lm", 80), kd_reduction="tokenmean",
            **{**STEPS, "max_steps": 5},
        )  # fmt: skip
        trainer.data_collator = collator
        trainer.train()
        runs.append(trainer)
    assert_same_run(*runs)


@pytest.mark.parametrize("told_by", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_no_position_predicts_the_next_sequence(told_by):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": [1] * length} for length in (3, 1, 2, 2)])
    batch = {"input_ids": batch["input_ids"], told_by: batch[told_by]}
    attended = TASKS["causal_lm"].attended(batch)
    assert attended.int().tolist() == [[1, 1, 0, 0, 1, 0, 1, 0]]


WITHOUT_POSITIONS = {"return_position_ids": False, "return_flash_attn_kwargs": True}


@pytest.mark.parametrize(
    "collator",
    [*(DataCollatorWithFlattening(**k) for k in [*FLATTENING.values(), WITHOUT_POSITIONS]), pack_in_bins],
)
def test_batchmean_is_refused(collator, tmp_path):
    trainer = tiny.trainer("causal_lm", tmp_path, pair=pair(), kd_reduction="batchmean")
    trainer.data_collator = collator
    with pytest.raises(ValueError, match=r"`kd_reduction` is 'batchmean'; expected 'tokenmean' with packed batches"):
        trainer.train()
