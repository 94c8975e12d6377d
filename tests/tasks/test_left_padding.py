"""The soft loss of a batch padded on either side is that of its rows alone, in float64; the hard loss is upstream's."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Trainer

from kd_trainer import DistillationTrainer
from kd_trainer.diagnostics import trial
from kd_trainer.tasks.inputs import begins_next, real_tokens, token_mask
from kd_trainer.tasks.kinds import TASKS
from tests.helpers import tiny
from tests.tasks import test_seq2seq

T = 2.0
CAUSAL = TASKS["causal_lm"]


def rows(count: int = 6, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [5, 3, 9, 2, 7, 4][:count]
    return [torch.randint(3, tiny.VOCAB, (n,), generator=generator) for n in lengths]


def pad(texts: list[torch.Tensor], side: str, label: Any = None, fill: int = 0) -> dict[str, torch.Tensor]:
    """As a tokenizer and `DataCollatorForLanguageModeling` do: labels are the ids, -100 at padding."""
    width, batch = max(map(len, texts)), {"input_ids": [], "attention_mask": [], "labels": []}
    for ids in texts:
        ends = (width - len(ids), 0) if side == "left" else (0, width - len(ids))
        batch["input_ids"].append(F.pad(ids, ends, value=fill))
        batch["attention_mask"].append(F.pad(torch.ones_like(ids), ends))
        batch["labels"].append(F.pad(ids if label is None else label(ids), ends, value=-100))
    return {name: torch.stack(column) for name, column in batch.items()}


def without(batch: dict, *names: str) -> dict:
    return {name: value for name, value in batch.items() if name not in names}


def four_dimensions(batch: dict, kind: str = "bool") -> dict:
    """Who reads whom, as a caller with masks of its own gives it."""
    tokens = batch["attention_mask"].bool()
    width = tokens.shape[1]
    reads = torch.ones(width, width, dtype=torch.bool).tril() & tokens[:, None, None, :]
    if kind == "bool":
        return {**batch, "attention_mask": reads}
    return {**batch, "attention_mask": torch.zeros(reads.shape).masked_fill(~reads, torch.finfo(torch.float32).min)}


def usual_positions(batch: dict, fill: int | None = 1) -> dict:
    mask = batch["attention_mask"]
    places = mask.cumsum(-1) - 1
    return {**batch, "position_ids": places.clamp(min=0) if fill is None else places.masked_fill(mask == 0, fill)}


def shift(batch: dict) -> dict:
    return {**without(batch, "labels"), "shift_labels": F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]}


def alone(pair: tuple, texts: list[torch.Tensor], label: Any = None, shifted: bool = True) -> tuple[float, int]:
    """(T^2 sum of KL(p || q), counted positions) of each text by itself, in float64."""
    total, count = 0.0, 0
    student, teacher = (model.double().eval() for model in pair)
    for ids in texts:
        labels = ids if label is None else label(ids)
        with torch.no_grad():
            z_s, z_t = (m(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0] for m in pair)
        kept = labels[1:] != -100 if shifted else labels != -100
        z_s, z_t = (z[:-1][kept] if shifted else z[kept] for z in (z_s, z_t))
        log_p, log_q = (F.log_softmax(z / T, -1) for z in (z_t, z_s))
        total += T**2 * float((log_p.exp() * (log_p - log_q)).sum())
        count += int(kept.sum())
    student.float(), teacher.float()
    return total, count


def llamas(seed: int = 0, **kwargs: Any) -> tuple:
    torch.manual_seed(seed)
    return tuple(LlamaForCausalLM(tiny.llama_config(h, **kwargs)) for h in (16, 24))


def measured(pair: tuple, batches: list[dict], output_dir: Any, **kwargs: Any) -> dict[str, float]:
    """What a training logs of batches of which each is a row of the data, without changing a weight."""
    settings = {"kd_temperature": T, "kd_reduction": "tokenmean", "learning_rate": 0.0, "max_steps": len(batches)}
    trainer = DistillationTrainer(
        model=pair[0], teacher_model=pair[1], train_dataset=batches, data_collator=lambda each: each[0],
        args=tiny.arguments(output_dir, **{**settings, "per_device_train_batch_size": 1, **kwargs}),
    )  # fmt: skip
    trainer.train()
    return {key: tiny.logged(trainer, key)[0] for key in ("soft_loss", "hard_loss", "loss", "teacher_agreement")}


@functools.lru_cache
def soft_only(way: str, positions: str = "labels", reduction: str = "tokenmean") -> DistillationTrainer:
    """A trainer whose loss is the soft loss, on the pair of `llamas()`."""
    pair, folder = llamas(), tempfile.mkdtemp()
    args = tiny.arguments(folder, kd_alpha=1.0, kd_temperature=T, kd_reduction=reduction, kd_positions=positions,
                          kd_loss_implementation=way)  # fmt: skip
    return DistillationTrainer(model=pair[0].eval(), teacher_model=pair[1], args=args)


def soft_loss(batch: dict, *settings: str) -> float:
    trainer = soft_only(*settings)
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


MAKE = {
    "mask": lambda batch: batch,
    "mask of booleans": lambda batch: {**batch, "attention_mask": batch["attention_mask"].bool()},
    "4D mask": four_dimensions,
    "4D mask, added": lambda batch: four_dimensions(batch, "float"),
    "positions, 1 at padding": usual_positions,
    "positions, 0 at padding": lambda batch: usual_positions(batch, None),
    "shift_labels": shift,
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["full", "fused"])
@pytest.mark.parametrize("positions", ["labels", "attended"])
@pytest.mark.parametrize("name", MAKE)
def test_the_soft_loss_is_that_of_each_row_alone(name, positions, way, side):
    texts = rows()
    total, count = alone(llamas(), texts)
    batch = MAKE[name](pad(texts, side))
    assert soft_loss(batch, way, positions) == pytest.approx(total / count, rel=1e-5)
    assert soft_loss(batch, way, positions, "batchmean") == pytest.approx(total / len(texts), rel=1e-5)


@pytest.mark.parametrize("way", ["full", "fused"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_masked_prompt_and_a_padding_token_that_is_a_text_token(side, way):
    """As scripts with pad = eos: the mask marks padding, the ids do not."""
    texts = [torch.cat([ids, torch.tensor([0])]) for ids in rows()]  # each text ends with the padding token
    label = lambda ids: torch.cat([torch.full((2,), -100), ids[2:]])  # noqa: E731
    total, count = alone(llamas(), texts, label)
    assert soft_loss(pad(texts, side, label), way) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("way", ["full", "fused"])
def test_micro_batches_of_either_side_are_one_batch(way, tmp_path):
    pair, texts = llamas(), rows()
    total, count = alone(pair, texts)
    batches = [pad(texts[:2], "left"), pad(texts[2:], "right")]
    found = measured(pair, batches, tmp_path, kd_loss_implementation=way, max_steps=1, gradient_accumulation_steps=2)
    assert found["soft_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_hard_loss_is_the_stock_trainers(side, tmp_path):
    """Upstream counts a first label that is predicted at padding; at alpha 0 nothing may differ from it."""
    batch, runs = pad(rows(), side), []
    data = {"train_dataset": [batch], "data_collator": lambda each: each[0]}
    steps = {"max_steps": 3, "per_device_train_batch_size": 1}
    stock = Trainer(model=llamas()[0], args=tiny.stock_arguments(tmp_path, **steps), **data)
    args = tiny.arguments(tmp_path, kd_alpha=0.0, kd_reduction="tokenmean", **steps)
    for trainer in (stock, DistillationTrainer(model=llamas()[0], args=args, **data)):
        trainer.train()
        runs.append((tiny.logged(trainer, "loss"), tiny.weights(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=1e-6)
    pair = llamas()
    with torch.no_grad():
        expected = float(pair[0](**batch).loss)
    for way in ("full", "fused"):
        found = measured(pair, [batch], tmp_path, kd_loss_implementation=way, kd_alpha=0.3)
        assert found["hard_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", ["full", "fused"])
def test_value_and_gradient_do_not_know_what_stands_at_padding(way, tmp_path):
    texts, gradients = rows(), []
    for fill in (0, 1):
        pair = llamas()
        trainer = DistillationTrainer(
            model=pair[0], teacher_model=pair[1], train_dataset=[{}],
            args=tiny.arguments(tmp_path, kd_alpha=1.0, kd_reduction="tokenmean", kd_loss_implementation=way),
        )  # fmt: skip
        loss = trainer.compute_loss(pair[0].eval(), pad(texts, "left", fill=fill))
        loss.backward()
        gradients.append((float(loss.detach()), torch.cat([p.grad.flatten()[5 * 16 :] for p in pair[0].parameters()])))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("way", "cached"), [("full", "logits"), ("fused", "hidden"), ("fused", "topk")])
def test_a_cache_built_with_one_side_serves_the_other(way, cached, tmp_path):
    """What is kept of a row are the positions that count, wherever its padding is."""
    texts = rows()
    data = [{"input_ids": ids.tolist()} for ids in texts]
    live = alone(llamas(), texts)

    def run(side: str, name: str = "one") -> dict[str, list[float]]:
        pair = llamas()
        collate = lambda features: pad([torch.tensor(f["input_ids"]) for f in features], side)  # noqa: E731
        trainer = DistillationTrainer(
            model=pair[0], teacher_model=pair[1], train_dataset=data, data_collator=collate,
            args=tiny.arguments(
                tmp_path / "out", kd_temperature=T, kd_reduction="tokenmean", learning_rate=0.0, max_steps=1,
                kd_loss_implementation=way, per_device_train_batch_size=6, per_device_eval_batch_size=4,
                teacher_cache_dir=str(tmp_path / name), teacher_cache_format=cached,
                teacher_cache_k=30 if cached == "topk" else None,
            ),
        )  # fmt: skip
        trainer.train()
        return tiny.logs(trainer)

    first = run("left")
    assert first["soft_loss"][0] == pytest.approx(live[0] / live[1], rel=2e-2 if cached == "topk" else 1e-5)
    again = run("right")
    for key in ("soft_loss", "teacher_agreement"):
        assert again[key] == pytest.approx(first[key], rel=1e-5)


@pytest.mark.parametrize("task", ["masked_lm", "token_classification"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tasks_without_a_shift_count_no_label_at_padding(task, side, tmp_path):
    """Labels that a collator left at padding are upstream's hard loss, and no soft loss."""
    torch.manual_seed(0)
    # Rows of one length, since learned positions know where a row begins.
    texts = [ids[:4] for ids in rows() if len(ids) >= 4]
    if task == "masked_lm":
        pair = tuple(BertForMaskedLM(tiny.bert_config(h, initializer_range=0.5)) for h in (16, 24))
    else:
        pair = tiny.models(task)
    batch = pad(texts, "right", lambda ids: ids % tiny.CLASSES)
    total, count = alone(pair, texts, lambda ids: ids % tiny.CLASSES, shifted=False)
    ends = (2, 0) if side == "left" else (0, 2)
    batch = {name: F.pad(value, ends, value=1 if name == "labels" else 0) for name, value in batch.items()}
    if side == "left":
        batch["position_ids"] = usual_positions(batch)["position_ids"]
    found = measured(pair, [batch], tmp_path)
    assert found["soft_loss"] == pytest.approx(total / count, rel=1e-5)
    with torch.no_grad():
        assert found["hard_loss"] == pytest.approx(float(pair[0](**batch).loss), rel=1e-5)


def test_a_decoder_padded_on_the_left(tmp_path):
    """decoder_attention_mask marks a decoder's padding: a label beside it is upstream's hard loss alone."""
    pair = test_seq2seq.models("t5")
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 20, shape, generator=generator) for shape in ((3, 6), (3, 4)))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wide, mask = F.pad(labels, (2, 0), value=-100), torch.ones(3, 6, dtype=torch.long)
    wide[:, 1] = 1  # a label at a position that the mask calls padding
    mask[:, :2] = 0
    task, counts = TASKS["seq2seq_lm"], []
    for given in ({"decoder_attention_mask": mask}, {}):
        made = {**batch, "labels": wide, **given}
        counts.append(int(task.soft_mask(made, task.targets(made), "labels").sum()))
    assert counts == [3 * 4, 3 * 5]
    found = measured(pair, [{**batch, "labels": wide, "decoder_attention_mask": mask}], tmp_path)
    assert all(torch.isfinite(torch.tensor(value)) for value in found.values())


# ---- by hand ----


def test_masks_by_hand():
    plain = torch.tensor([[0, 1, 1], [1, 1, 0]])
    wanted = plain.bool().tolist()
    four = four_dimensions({"attention_mask": plain})["attention_mask"]
    added = four_dimensions({"attention_mask": plain}, "float")["attention_mask"]
    kinds = {"sliding_attention": four & four.new_ones(3, 3).triu(0), "full_attention": four}
    for mask in (plain, plain.bool(), plain.float(), four, added, four[:, 0], four.int(), kinds):
        assert real_tokens(mask, (2, 3)).tolist() == wanted
    assert real_tokens(plain[:1], (2, 3)).tolist() == [wanted[0]] * 2
    assert real_tokens(plain, (2, 4)) is None
    for none in (None, "all", {}, torch.ones(3), torch.ones(2, 1, 3, 4)):
        assert token_mask(none) is None


def test_a_mask_of_blocks_tells_sequences_apart():
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()[None, None]
    batch = {"input_ids": torch.arange(5)[None], "attention_mask": blocks, "labels": torch.arange(5)[None]}
    assert begins_next(batch, torch.ones(1, 5)).tolist() == [[False, True, False, False]]
    assert CAUSAL.attended(batch).tolist() == [[True, False, True, True, False]]
    assert CAUSAL.soft_mask(batch, CAUSAL.targets(batch), "labels").tolist() == [[True, False, True, True, False]]


@pytest.mark.parametrize("boundaries", [
    {"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])},
    {"cu_seq_lens_q": torch.tensor([0, 2, 5])}, {"position_ids": torch.tensor([0, 1, 0, 1, 2])},
], ids=["positions", "seq_idx", "cu_seq_lens", "positions of one dimension"])  # fmt: skip
def test_no_soft_loss_across_two_packed_sequences(boundaries):
    """A first label that was not masked belongs to no sequence before it."""
    batch = {"input_ids": torch.arange(5)[None], "labels": torch.arange(5)[None], **boundaries}
    for positions in ("labels", "attended"):
        mask = CAUSAL.soft_mask(batch, CAUSAL.targets(batch), positions)
        assert mask.tolist() == [[True, False, True, True, False]], positions
    given = {**batch, "shift_labels": torch.arange(5)[None]}  # the collator may have put an end token there
    assert CAUSAL.soft_mask(given, CAUSAL.targets(given), "labels").all()


def test_nothing_that_tells_padding_leaves_labels_alone():
    batch = {"input_ids": torch.arange(6).view(2, 3), "labels": torch.arange(6).view(2, 3)}
    assert CAUSAL.made_at(batch, CAUSAL.targets(batch)) is None


# ---- check() ----


def looked_at(output_dir: Any, texts: list[torch.Tensor], side: str, build: Any = llamas, **kwargs: Any) -> list:
    pair, settings = build(), {"kd_reduction": "tokenmean", "per_device_train_batch_size": 6, **kwargs}
    trainer = DistillationTrainer(
        model=pair[0], teacher_model=pair[1], args=tiny.arguments(output_dir, **settings),
        train_dataset=texts, data_collator=lambda features: pad(features, side),
    )  # fmt: skip
    return [row for row in trainer.check(evaluate=False) if row.what in ("padding", "labels")]


@pytest.mark.parametrize("reduction", ["tokenmean", "batchmean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_check_pads_on_both_sides(side, reduction, tmp_path):
    """The side of the batch first; a position more or less in the counts would show."""
    found = looked_at(tmp_path, rows(), side, kd_reduction=reduction)
    first, second = (row for row in found if row.what == "padding")
    assert f"8 more positions on the {side}" in first.found
    assert f"8 more positions on the {'right' if side == 'left' else 'left'}" in second.found
    for row in (first, second):
        assert row.status == "ok", row
        assert float(row.found.rsplit(" ", 1)[1]) < 1e-5
    warnings = [row for row in found if row.what == "labels" and "predicted before" in row.found]
    assert [row.found.count("5 first ones of a text") for row in warnings] == ([1] if side == "left" else [])


def test_check_divides_each_batch_by_its_own_counts(tmp_path, monkeypatch):
    """Positions that are wrongly counted at padding would be hidden by the counts of the batch without it."""
    widths, own = [], trial._losses

    def losses(given: Any, batches: list[dict], whole: dict) -> float:
        if len(batches) == 1:
            widths.append((batches[0]["input_ids"].shape[1], whole["input_ids"].shape[1]))
        return own(given, batches, whole)

    monkeypatch.setattr(trial, "_losses", losses)
    looked_at(tmp_path, rows(), "left")
    assert {17} < {width for width, _ in widths}
    assert all(width == counted for width, counted in widths)


def test_a_side_on_which_no_row_is_padded_gives_no_warning(tmp_path):
    """Learned positions move with padding on the left, which a batch padded on the right never sees."""

    def build() -> tuple:
        torch.manual_seed(0)
        sizes = {"vocab_size": tiny.VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
        config = GPT2Config(**sizes, initializer_range=0.5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return GPT2LMHeadModel(config), GPT2LMHeadModel(config)

    for side, statuses in (("right", ["ok", "ok"]), ("left", ["warning", "ok"])):
        found = [row for row in looked_at(tmp_path, rows(), side, build) if row.what == "padding"]
        assert [row.status for row in found] == statuses
    assert "no row of this batch is padded there" in looked_at(tmp_path, rows(), "right", build)[-1].found
