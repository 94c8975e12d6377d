"""Narrower students: models with units that do nothing are pruned to the models without them; importance by hand."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kd_trainer import student_from_teacher
from tests.helpers import tiny
from tests.teachers.test_students import build

VOCAB, LAYERS = 37, 2
HIDDEN, HEADS, NEURONS = 16, 2, 12  # of the small model; a head has 8 channels, or 4 where the config may choose
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "max_position_embeddings": 16}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {**SIZES, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": NEURONS}
GQA = {**PLAIN, "num_attention_heads": 2 * HEADS, "num_key_value_heads": HEADS, "head_dim": 4}
GEMMA = {**GQA, "query_pre_attn_scalar": 4, "sliding_window": 3}
DISTIL = {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": NEURONS, "n_layers": LAYERS, "n_heads": HEADS}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": NEURONS}
GPT2 |= {"n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 4, "d_ff": NEURONS, "num_heads": HEADS, "num_layers": LAYERS}
T5 |= {"decoder_start_token_id": 0}
SIDES = ("encoder", "decoder")
BART = {"vocab_size": VOCAB, "d_model": HIDDEN, "max_position_embeddings": 16}
BART |= {f"{side}_{name}": n for side in SIDES for name, n in (("layers", 2), ("ffn_dim", 12), ("attention_heads", 2))}
VIT = {name: size for name, size in PLAIN.items() if name in ("hidden_size", "intermediate_size")}
VIT |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": 8, "patch_size": 4}
# class -> (config of the small model, fields that are twice as large in the wide one)
WIDE = ("hidden_size", "num_attention_heads", "intermediate_size")
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "LlamaForCausalLM": ({**GQA, "attention_bias": True, "mlp_bias": True}, (*WIDE, "num_key_value_heads")),
    "MistralForCausalLM": (GQA, (*WIDE, "num_key_value_heads")),
    "Qwen2ForCausalLM": ({**GQA, "tie_word_embeddings": True}, (*WIDE, "num_key_value_heads")),
    "Qwen3ForCausalLM": (GQA, (*WIDE, "num_key_value_heads")),
    "GemmaForCausalLM": (GQA, (*WIDE, "num_key_value_heads")),
    "Gemma2ForCausalLM": (GEMMA, (*WIDE, "num_key_value_heads")),
    "Gemma3ForCausalLM": (GEMMA, (*WIDE, "num_key_value_heads")),
    "GPT2LMHeadModel": (GPT2, ("n_embd", "n_head", "n_inner")),
    "BertForMaskedLM": (PLAIN, WIDE),
    "BertForSequenceClassification": ({**PLAIN, "num_labels": 3}, WIDE),
    "RobertaForSequenceClassification": ({**PLAIN, "num_labels": 3, "max_position_embeddings": 32}, WIDE),
    "DistilBertForSequenceClassification": ({**DISTIL, "num_labels": 3}, ("dim", "n_heads", "hidden_dim")),
    "ViTForImageClassification": (VIT, WIDE),
    "T5ForConditionalGeneration": (
        {**T5, "feed_forward_proj": "gated-gelu"},
        ("d_model", "num_heads", "d_ff"),
    ),
    "BartForConditionalGeneration": (
        BART,
        ("d_model", *(f"{side}_{name}" for side in SIDES for name in ("ffn_dim", "attention_heads"))),
    ),
}
# Their norms are before the layers: the wide model computes the same, for any channels that are copies of others.
PRE_NORM = [f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")]
PRE_NORM += ["GPT2LMHeadModel", "ViTForImageClassification"]
# Parameters whose axis holds heads or neurons, and whether a unit does nothing when they are zero.
UNITS = [
    (r"(q_proj|k_proj|self\.query|self\.key|q_lin|k_lin|Attention\.[qk])\.(weight|bias)", 0, "heads", False),
    (r"(v_proj|self\.value|v_lin|Attention\.v)\.(weight|bias)", 0, "heads", True),
    (r"(o_proj|attn\.out_proj|attention\.output\.dense|out_lin|Attention\.o)\.weight", 1, "heads", False),
    (r"relative_attention_bias\.weight", 1, "heads", False),
    (r"gate_proj\.(weight|bias)|wi_0\.weight", 0, "neurons", False),
    (r"(up_proj|intermediate\.dense|lin1|fc1)\.(weight|bias)|wi_1\.weight", 0, "neurons", True),
    (r"(down_proj|[0-9]\.output\.dense|lin2|fc2|wo)\.weight", 1, "neurons", False),
    (r"c_fc\.(weight|bias)", -1, "neurons", True),
    (r"mlp\.c_proj\.weight", 0, "neurons", False),
    (r"attn\.c_proj\.weight", 0, "heads", False),
]


def model_of(name: str, **kwargs: Any) -> Any:
    """All weights drawn, in float64."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**kwargs)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(model: Any) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=draw, dtype=model.dtype)}
    ids = torch.randint(3, VOCAB, (4, 9), generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids.flip(-1)} if model.config.is_encoder_decoder else inputs


def logits(model: Any, inputs: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or inputs_of(model))).logits


class Widening:
    """Twice the heads, neurons and channels, at drawn places, of which the new ones do nothing.

    A new channel is a copy of another, so that the statistics of the norms stay, and 0 behind them. A new head has the
    value 0, a new neuron the input 0. Their other weights are drawn.
    """

    def __init__(self, gemma: bool) -> None:
        self.gemma = gemma
        self.draw = torch.Generator().manual_seed(2)
        self.places: dict[str, Tensor] = {}

    def put(self, small: Tensor, axis: int, units: str, count: int, new: Tensor | None) -> Tensor:
        """`small` at the kept places of `axis`; the new units are drawn, or those of `new`."""
        if units not in self.places:
            self.places[units] = torch.randperm(2 * count, generator=self.draw)
        parts = small.unflatten(axis, (count, -1)).movedim(axis, 0)
        drawn = torch.randn(parts.shape, generator=self.draw, dtype=small.dtype)
        others = drawn if new is None else new.unflatten(axis, (count, -1)).movedim(axis, 0)
        wide = small.new_empty(2 * count, *parts.shape[1:])
        kept, rest = self.places[units].chunk(2)
        wide[kept.sort().values], wide[rest] = parts, others
        return wide.movedim(0, axis).flatten(axis, axis + 1)

    def weight(self, name: str, weight: Tensor, shape: torch.Size, embeds: bool) -> Tensor:
        """The wide model's weight, of this shape."""
        layer = re.match(r".*\.(?:layers?|h|block)\.\d+\.", name)
        group = next((each for each in ("SelfAttention", "encoder_attn") if each in name), "")
        # T5's self-attention: one table of positions for all layers, so that they have the same heads.
        prefix = name.split(".")[0] if group == "SelfAttention" else layer and layer[0] + group
        done = set()
        if "c_attn" in name:
            q, k, v = weight.chunk(3, -1)
            parts = [(q, None), (k, None), (v, 0 * v)]
            done = {weight.ndim - 1}
            weight = torch.cat([self.put(x, x.ndim - 1, f"{prefix}heads", HEADS, new) for x, new in parts], -1)
        for pattern, axis, kind, silent in UNITS:
            if layer and re.search(f"({pattern})$", name):
                count, axis = HEADS if kind == "heads" else NEURONS, axis % weight.ndim
                weight = self.put(weight, axis, f"{prefix}{kind}", count, 0 * weight if silent else None)
                done = {axis}
        for axis in {*range(weight.ndim)} - done:
            if weight.shape[axis] != shape[axis]:
                new: Tensor | None = weight
                if re.search("(?i)norm|ln_", name):
                    new = 0 * weight - int(self.gemma)  # Gemma's norms multiply by 1 + weight
                elif weight.ndim == 2 and not embeds and axis == (0 if "c_" in name else 1):
                    new = None
                weight = self.put(weight, axis, "channels", HIDDEN, new)
        assert weight.shape == shape, name
        return weight


def small_and_wide(name: str) -> tuple[Any, Any]:
    """A model, and one of twice its widths that holds it."""
    sizes, doubled = FAMILIES[name]
    small, wide = model_of(name, **sizes), model_of(name, **{**sizes, **{field: 2 * sizes[field] for field in doubled}})
    widening, weights = Widening(name.startswith("Gemma")), dict(wide.named_parameters())
    with torch.no_grad():
        for path, weight in small.named_parameters():
            embeds = isinstance(small.get_submodule(path.rpartition(".")[0]), nn.Embedding)
            weights[path].copy_(widening.weight(path, weight, weights[path].shape, embeds))
    return small, wide


@pytest.mark.parametrize("name", FAMILIES)
def test_what_does_nothing_is_pruned(name, tmp_path, caplog):
    """Biases, norms, tied and fused weights, grouped heads: the student is the small model, bit for bit."""
    small, wide = small_and_wide(name)
    before = copy.deepcopy(wide.state_dict())
    widths = {"num_attention_heads": small.config.num_attention_heads, "hidden_size": HIDDEN}
    student = student_from_teacher(wide, intermediate_size=NEURONS, calibration=inputs_of(wide), **widths)
    expected, found = small.state_dict(), student.state_dict()
    assert found.keys() == expected.keys()
    assert not [path for path in found if not torch.equal(found[path], expected[path])]
    assert torch.equal(logits(student), logits(small))
    if name in PRE_NORM:
        torch.testing.assert_close(logits(student), logits(wide), rtol=0, atol=1e-5)  # RMSNorm computes in float32
    own = {"num_attention_heads": widths["num_attention_heads"]} if re.match("Llama|M|Q|Ge|T5", name) else {}
    narrow = student_from_teacher(wide, intermediate_size=NEURONS, calibration=inputs_of(wide), **own)
    torch.testing.assert_close(logits(narrow), logits(wide), rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[path]) for path, value in wide.state_dict().items())
    full = student_from_teacher(small, intermediate_size=NEURONS, **widths)  # nothing to choose
    assert torch.equal(logits(full), logits(small))
    assert full.config.to_dict() == small.config.to_dict()
    student.save_pretrained(tmp_path)
    loaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not caplog.records
    assert torch.equal(logits(loaded), logits(small))
    student.train()(**inputs_of(student)).logits.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


# ---- importance, by hand ----


def padded_llama() -> tuple[Any, list[dict[str, Tensor]]]:
    teacher = model_of("LlamaForCausalLM", **{**GQA, "num_key_value_heads": 4, "num_attention_heads": 8})
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (6, 9), generator=draw)
    mask = (torch.arange(9) < torch.tensor([9, 2, 7, 4, 9, 1])[:, None]).long()
    rows = {"input_ids": ids, "attention_mask": mask}
    return teacher, [{key: value[i : i + 1, : mask[i].sum()] for key, value in rows.items()} for i in range(6)]


def seen(model: Any, rows: list[dict[str, Tensor]], path: str, what: str) -> list[Tensor]:
    """For each row what a module reads or gives [S, ...]."""
    found = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        value = (args[0] if args else kwargs["hidden_states"]) if what == "input" else output
        found.append((value if isinstance(value, Tensor) else value[0])[0])

    handle = model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    for row in rows:
        logits(model, row)
    handle.remove()
    return found


def score(values: list[Tensor]) -> Tensor:
    return sum(value.abs().mean(0) ** 2 for value in values) ** 0.5


def largest(scores: Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def collated(rows: list[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    length = max(row["input_ids"].shape[1] for row in rows)
    padded = {"input_ids": pad, "attention_mask": 0}
    return {
        key: torch.cat([nn.functional.pad(row[key], (0, length - row[key].shape[1]), value=value) for row in rows])
        for key, value in padded.items()
    }


def test_importance_by_hand():
    teacher, rows = padded_llama()
    teacher.model.embed_tokens.weight.data *= 5  # channels of both signs
    student = student_from_teacher(
        teacher, num_attention_heads=4, intermediate_size=5, hidden_size=8, calibration=collated(rows, pad=0)
    )
    norms = ["model.norm"] + [f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    channels = largest(sum(score(seen(teacher, rows, path, "output")) for path in norms), 8)
    for i, (old, new) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        neurons = largest(score(seen(teacher, rows, f"model.layers.{i}.mlp.down_proj", "input")), 5)
        outputs = seen(teacher, rows, f"model.layers.{i}.self_attn.o_proj", "input")
        # A group is two heads of 4 channels, with one key and value of 4.
        groups = largest(score([output.view(-1, 4, 8).norm(dim=-1) for output in outputs]), 2)
        heads = [8 * group + c for group in groups for c in range(8)]
        values = [4 * group + c for group in groups for c in range(4)]
        attention, mlp = old.self_attn, old.mlp
        assert torch.equal(new.mlp.gate_proj.weight, mlp.gate_proj.weight[neurons][:, channels])
        assert torch.equal(new.mlp.down_proj.weight, mlp.down_proj.weight[channels][:, neurons])
        assert torch.equal(new.self_attn.q_proj.weight, attention.q_proj.weight[heads][:, channels])
        assert torch.equal(new.self_attn.k_proj.weight, attention.k_proj.weight[values][:, channels])
        assert torch.equal(new.self_attn.v_proj.weight, attention.v_proj.weight[values][:, channels])
        assert torch.equal(new.self_attn.o_proj.weight, attention.o_proj.weight[channels][:, heads])
        assert torch.equal(new.input_layernorm.weight, old.input_layernorm.weight[channels])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, channels])
    assert student.config.num_key_value_heads == 2


def test_influence_by_hand():
    teacher = model_of("LlamaForCausalLM", **{**GQA, "num_hidden_layers": 5})
    _, rows = padded_llama()
    influence = []
    for i in range(5):
        before, after = (torch.cat(seen(teacher, rows, f"model.layers.{i}", side)) for side in ("input", "output"))
        influence.append(1 - nn.functional.cosine_similarity(before, after).mean().item())
    for count in (1, 2, 3, 5):
        student = student_from_teacher(teacher, layers=f"influence_{count}", calibration=collated(rows, pad=5))
        kept = largest(torch.tensor(influence), count)
        assert torch.equal(logits(student), logits(student_from_teacher(teacher, layers=kept)))


def test_the_choice_does_not_depend_on_batches_and_padding():
    """One batch, several, a DataLoader; other pads; the same rows in another order."""
    teacher, rows = padded_llama()
    kinds = [
        collated(rows, pad=0),
        collated(rows, pad=11),
        rows,
        [collated(rows[3:], pad=0), collated(rows[:3], pad=0)],
        (row for row in rows),
        torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=lambda part: collated(part, pad=1)),
    ]
    widths = {"layers": "influence_1", "num_attention_heads": 4, "intermediate_size": 5, "hidden_size": 8}
    drawn = torch.get_rng_state()
    first, *others = (student_from_teacher(teacher, calibration=kind, **widths) for kind in kinds)
    assert torch.equal(torch.get_rng_state(), drawn)
    for other in others:
        assert torch.equal(tiny.weights(other), tiny.weights(first))


def test_layers_and_widths_at_once():
    teacher = model_of("LlamaForCausalLM", **{**GQA, "num_hidden_layers": 4})
    _, rows = padded_llama()
    both = student_from_teacher(teacher, layers=[0, 3], intermediate_size=5, calibration=rows)
    narrow = student_from_teacher(teacher, intermediate_size=5, calibration=rows)
    assert torch.equal(logits(both), logits(student_from_teacher(narrow, layers=[0, 3])))


def test_the_teacher_is_left_as_it_was():
    teacher, rows = padded_llama()
    teacher.config.attention_dropout = teacher.model.layers[1].self_attn.attention_dropout = 0.5
    expected = student_from_teacher(teacher, intermediate_size=5, calibration=rows)
    teacher.train().model.layers[0].eval()
    modes = [module.training for module in teacher.modules()]
    with pytest.raises(TypeError, match="`calibration` is of list without tensors; expected batches"):
        student_from_teacher(teacher, intermediate_size=5, calibration=[*rows, [1]])
    assert torch.equal(logits(student_from_teacher(teacher, intermediate_size=5, calibration=rows)), logits(expected))
    assert [module.training for module in teacher.modules()] == modes
    hooks = [hook for m in teacher.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


def test_encoder_and_decoder_have_their_masks():
    """Positions without a label do not count in the decoder, padding not in the encoder."""
    teacher = model_of("T5ForConditionalGeneration", **{**T5, "num_layers": 3, "num_decoder_layers": 2})
    draw = torch.Generator().manual_seed(4)
    ids, labels = (torch.randint(3, VOCAB, (1, 6), generator=draw) for _ in range(2))
    short = {"input_ids": ids[:, :4], "labels": labels[:, :3]}
    mask = (torch.arange(6) < 4).long()[None]
    long = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels.where(torch.arange(6) < 3, -100)}
    widths = {"num_attention_heads": 1, "intermediate_size": 5, "hidden_size": 8}
    one, other = (student_from_teacher(teacher, layers="influence_2", calibration=b, **widths) for b in (short, long))
    assert torch.equal(tiny.weights(one), tiny.weights(other))


def test_the_heads_of_one_table_of_positions():
    """T5's first layer has a number for each head of all layers: it stays, and all layers keep the same heads."""
    teacher = model_of("T5ForConditionalGeneration", **{**T5, "num_layers": 3, "num_decoder_layers": 3})
    layers = [block.layer[0].SelfAttention for block in teacher.encoder.block]
    with torch.no_grad():
        for layer, head, factor in ((0, 1, 0.6), (1, 0, 0.01), (2, 1, 0.6)):  # heads have 4 channels
            layers[layer].v.weight[4 * head : 4 * head + 4] *= factor
        for part in (layers[0].o, teacher.encoder.block[0].layer[1].DenseReluDense.wo):
            part.weight.zero_()  # the layer changes nothing
    options = {"num_attention_heads": 1, "calibration": inputs_of(teacher)}
    student = student_from_teacher(teacher, layers="influence_2", **options)
    assert torch.equal(student.encoder.block[0].layer[0].SelfAttention.o.weight, torch.zeros(16, 4, dtype=torch.double))
    wide = student_from_teacher(teacher, **options)
    kept = [block.layer[0].SelfAttention for block in wide.encoder.block]
    for old, new in zip(layers, kept, strict=True):
        assert torch.equal(new.q.weight, old.q.weight[4:])
    assert torch.equal(kept[0].relative_attention_bias.weight, layers[0].relative_attention_bias.weight[:, 1:])


def test_a_head_size_that_the_config_derives(tmp_path):
    """And norms of queries and keys as wide as the hidden size, which are no norms of the channels."""
    teacher = model_of("Qwen2ForCausalLM", **{**PLAIN, "num_attention_heads": 4, "num_key_value_heads": 4})
    student = student_from_teacher(teacher, num_attention_heads=2, calibration=inputs_of(teacher))
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(type(student).from_pretrained(tmp_path)), logits(student))
    assert student.config.head_dim == 4
    teacher = model_of("Qwen3ForCausalLM", **{**GQA, "head_dim": HIDDEN})
    student = student_from_teacher(teacher, hidden_size=8, calibration=inputs_of(teacher))
    assert student.model.layers[0].self_attn.q_norm.weight.shape == (HIDDEN,)


def test_influence_needs_no_layout():
    teacher = build("BloomForCausalLM")
    batch = {"input_ids": torch.arange(3, 12)[None]}
    assert len(student_from_teacher(teacher, layers="influence_2", calibration=batch).transformer.h) == 2


def test_it_is_distilled_by_its_teacher(tmp_path):
    teacher = tiny.LlamaForCausalLM(tiny.llama_config(num_hidden_layers=2))
    widths = {"intermediate_size": 16, "hidden_size": 8}
    batch = {"input_ids": torch.arange(1, 33).view(4, 8)}
    student = student_from_teacher(teacher, calibration=batch, **widths)
    start = tiny.weights(student).clone()
    tiny.trainer("causal_lm", tmp_path, pair=(student, teacher), kd_reduction="tokenmean").train()
    assert not torch.equal(tiny.weights(student), start)


# ---- errors ----

NO_FIELD = r"a head has 8 channels and the config of bert has no field for that. "


@pytest.mark.parametrize(
    ("name", "widths", "error", "said"),
    [
        ("LlamaForCausalLM", {"intermediate_size": 13}, ValueError, "from 1 to 12, the teacher's. Half of the"),
        ("LlamaForCausalLM", {"intermediate_size": 0}, ValueError, "`intermediate_size` is 0; expected a whole number"),
        ("LlamaForCausalLM", {"intermediate_size": 0.5}, TypeError, "from 1 to 12, the teacher's. Half of the teacher"),
        ("LlamaForCausalLM", {"hidden_size": True}, TypeError, "`hidden_size` is True; expected a whole number"),
        ("LlamaForCausalLM", {"num_attention_heads": 3}, ValueError, "expected a multiple of 2, because 2 heads share"),
        ("LlamaForCausalLM", {"hidden_size": 10}, ValueError, "The hidden size (10) is not a multiple of the number"),
        (
            "BertForMaskedLM",
            {"num_attention_heads": 1},
            ValueError,
            NO_FIELD + "Set num_attention_heads=1 and",
        ),
        ("BertForMaskedLM", {"hidden_size": 8}, ValueError, NO_FIELD + "Set num_attention_heads=1 and hidden_size=8."),
        (
            "BertForMaskedLM",
            {"hidden_size": 9, "num_attention_heads": 1},
            ValueError,
            "`hidden_size` is 9; expected",
        ),
    ],
)
def test_wrong_widths(name, widths, error, said):
    with pytest.raises(error) as caught:
        student_from_teacher(model_of(name, **FAMILIES[name][0]), calibration={}, **widths)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("calibration", "error", "said"),
    [
        (None, ValueError, "`calibration` is None; expected a batch of the model's inputs, or several"),
        ("rows", TypeError, "`calibration` is of type str; expected a batch"),
        (3, TypeError, "`calibration` is of type int; expected a batch"),
        ([], ValueError, "`calibration` is empty; expected at least one batch"),
        (
            [{"input_ids": [1, 2]}],
            TypeError,
            "of dict without tensors; expected batches: dicts of tensors.",
        ),
    ],
)
@pytest.mark.parametrize("widths", [{"intermediate_size": 5}, {"layers": "influence_1"}])
def test_wrong_calibration(calibration, error, said, widths):
    with pytest.raises(error) as caught:
        student_from_teacher(padded_llama()[0], calibration=calibration, **widths)
    assert said in str(caught.value)


def test_activations_that_are_not_finite():
    teacher, rows = padded_llama()
    teacher.model.layers[0].mlp.up_proj.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="`calibration` is batches with activations that are not finite"):
        student_from_teacher(teacher, intermediate_size=5, calibration=rows)


def test_an_unknown_layout_is_named():
    teacher, batch = build("BloomForCausalLM"), {"input_ids": torch.arange(3, 12)[None]}
    said = r"`hidden_size` is 8; expected None, because which weights of BloomForCausalLM \(bloom\) .* with `layers`"
    with pytest.raises(ValueError, match=said):
        student_from_teacher(teacher, hidden_size=8, calibration=batch)


def test_encoders_and_decoders_of_two_sizes():
    teacher = model_of("BartForConditionalGeneration", **{**BART, "decoder_ffn_dim": 20})
    with pytest.raises(ValueError, match=r"because encoder and decoder differ in it: 12 and 20. Prune another"):
        student_from_teacher(teacher, intermediate_size=5, calibration={})
    sizes = {"num_attention_heads": 1, "hidden_size": 8}
    student = student_from_teacher(teacher, calibration=inputs_of(teacher), **sizes)
    assert (student.config.encoder_ffn_dim, student.config.decoder_ffn_dim) == (12, 20)


@pytest.mark.parametrize("layers", ["influence_0", "influence_3", "influence_x"])
def test_wrong_numbers_of_layers(layers):
    with pytest.raises(ValueError, match=r'or "influence_n" up to 2'):
        student_from_teacher(padded_llama()[0], layers=layers)
