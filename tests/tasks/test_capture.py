"""What is recorded of a layer equals an independent computation from eager attention, and changes nothing."""

from __future__ import annotations

import copy
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from kd_trainer.losses.features import FEATURES
from kd_trainer.tasks.capture import capture, layer_pairs, layers_of

VOCAB, RELATION_HEADS = 40, 4
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "hidden_size": 16}
TEXT = {**SIZES, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 4}
BART = {
    **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 32},
    **{"decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
CONV = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
SPEECH = {**SIZES, **CONV, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
# Name of the config, class, sizes, and the projections to q, k and v of a layer where no rotation follows them.
MODELS: dict[str, tuple[str, str, dict[str, Any], str | None]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", TEXT, "attention.self.query,key,value"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", TEXT, "attention.self.query,key,value"),
    "distilbert": (
        "DistilBertConfig", "DistilBertForSequenceClassification",
        {"vocab_size": VOCAB, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32}, "attention.q_lin,k_lin,v_lin",
    ),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification", {**TEXT, "local_attention": 4}, None),
    "deberta_v2": (
        "DebertaV2Config", "DebertaV2ForSequenceClassification",
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
        "attention.self.query_proj,key_proj,value_proj",
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGE, "attention.q_proj,k_proj,v_proj"),
    "wav2vec2": (
        "Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", {**SPEECH, "feat_extract_norm": "layer"},
        "attention.q_proj,k_proj,v_proj",
    ),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        "attn.c_attn",
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, None),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED, None),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GROUPED, "num_key_value_heads": 1}, None),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "sliding_window": 3}, None),
    "t5": (
        "T5Config", "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4},
        "layer.0.SelfAttention.q,k,v",
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART, "self_attn.q_proj,k_proj,v_proj"),
}  # fmt: skip
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
each_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    config, model, sizes, _ = MODELS[name]
    torch.manual_seed(seed)
    made = getattr(hf, model)(getattr(hf, config)(**{**sizes, **kwargs})).eval()
    for parameter in made.parameters():  # attention that is far from uniform
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def batch(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name in ("vit", "swin"):
        return {"pixel_values": torch.randn(3, 3, *(8 if name == "vit" else 16,) * 2, generator=generator)}
    if name == "wav2vec2":
        return {"input_values": torch.randn(3, 60, generator=generator)}
    ids = torch.randint(3, VOCAB, MASK.shape, generator=generator)
    made = {"input_ids": ids, "attention_mask": MASK}
    if name in ("t5", "bart"):
        made["decoder_input_ids"] = torch.randint(3, VOCAB, (3, 4), generator=generator)
    return made


def in_double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def positions(name: str) -> torch.Tensor | None:
    return MASK.bool() if "input_ids" in batch(name) else None


def eager(model: nn.Module, name: str, layer: int) -> SimpleNamespace:
    """Hidden states, attention probabilities and [q, k, v] of a layer, by eager attention and hooks on projections."""
    model = copy.deepcopy(model)
    if name != "deberta_v2":
        model.set_attn_implementation("eager")
    seen: dict[str, torch.Tensor] = {}
    projections = MODELS[name][3]
    if projections is not None:
        path, _, rest = projections.rpartition(".")
        for part in rest.split(","):
            module = layers_of(model)[layer].get_submodule(f"{path}.{part}")
            module.register_forward_hook(lambda m, i, o, part=part: seen.setdefault(part, o) is None or None)
    outputs = model(**in_double(batch(name)), output_attentions=True, output_hidden_states=True)
    of_encoder = "encoder_" if name in ("t5", "bart") else ""
    qkv = list(seen.values())
    hidden = getattr(outputs, f"{of_encoder}hidden_states")[layer + 1]
    return SimpleNamespace(
        hidden=hidden,
        probs=getattr(outputs, f"{of_encoder}attentions")[layer],
        qkv=list(qkv[0].chunk(3, -1)) if len(qkv) == 1 else qkv,
    )


def written_out(name: str, student: SimpleNamespace, teacher: SimpleNamespace, mask: torch.Tensor | None):
    """The loss of a feature for each row, from eager attention, row by row over the attended positions."""
    losses = []
    for row in range(len(student.hidden)):
        at = torch.arange(student.hidden.shape[1]) if mask is None else mask[row].nonzero().flatten()
        if name.startswith("hidden"):
            s, t = student.hidden[row, at], teacher.hidden[row, at]
            if name == "hidden_mse":
                losses.append((((s - t) ** 2).mean(-1) / (t**2).mean(-1)).sum())
            else:
                losses.append((1 - torch.cosine_similarity(s, t, dim=-1)).sum())
        elif name == "attention":
            p, q = (x.probs[row][:, at] for x in (teacher, student))
            terms = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0)
            losses.append(terms.sum() / len(p))
        else:
            total = torch.zeros((), dtype=torch.float64)
            for x, y in zip(student.qkv, teacher.qkv, strict=True):
                for s, t in zip(*(z[row, at].chunk(RELATION_HEADS, -1) for z in (x, y)), strict=True):
                    q, p = ((z @ z.T / math.sqrt(z.shape[1])).softmax(-1) for z in (s, t))
                    total += nn.functional.kl_div(q.log(), p, reduction="sum")
            losses.append(total / 3 / RELATION_HEADS)
    return torch.stack(losses)


def recorded(name: str, model: nn.Module, layer: int) -> SimpleNamespace:
    with capture(model, [layer]) as captured:
        model(**in_double(batch(name)))
    return SimpleNamespace(hidden=captured.hidden(layer), attention=captured.attention(layer))


@each_model
def test_features_equal_eager_attention_in_float64(name):
    """Student and teacher with their default attention; the first layer, which upstream ties to no other output."""
    student, teacher = build(name).double(), build(name, 1).double()
    sides = [(recorded(name, model, 0), eager(model, name, 0)) for model in (student, teacher)]
    (one, plain_one), (other, plain_other) = sides
    for feature, entry in FEATURES.items():
        if (feature == "relation" and MODELS[name][3] is None) or (feature == "attention" and name == "deberta_v2"):
            continue
        given = [side.hidden if entry.reads == "hidden" else side.attention for side in (one, other)]
        value = entry.loss(*given, positions(name), **({"heads": RELATION_HEADS} if entry.has_heads else {}))
        expected = written_out(feature, plain_one, plain_other, positions(name))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        assert value.min().item() > 1e-3  # the sides differ: nothing is compared with itself


@each_model
def test_logits_are_bit_equal_and_nothing_is_left_behind(name):
    model, inputs = build(name), batch(name)
    upstream = hf.AttentionInterface.get_interface
    plain = model(**inputs).logits
    with capture(model, [0, 1]) as captured:
        logits = model(**inputs).logits
    assert torch.equal(plain, logits)
    assert hf.AttentionInterface.get_interface is upstream
    assert not [m for m in model.modules() for hook in m._forward_hooks.values() if "see_" in repr(hook)]
    heads = [captured.attention(layer) for layer in (0, 1)]
    assert all(x.requires_grad for attention in heads for x in attention[:3])
    assert len(layers_of(model)) == 2


def test_keys_and_values_of_groups_come_before_their_repetition():
    with capture(model := build("llama"), [1]) as captured:
        model(**batch("llama"))
    assert [x.shape[1] for x in captured.attention(1)[:3]] == [4, 2, 2]


def test_captures_nest_and_other_threads_and_models_are_not_recorded():
    model, other, inputs = build("bert"), build("bert", 1), batch("bert")
    with capture(model, [0]) as outer, capture(other, [0]) as inner:
        thread = threading.Thread(target=lambda: model(**inputs))
        thread.start()
        thread.join()
        assert not outer.outputs
        other(**inputs)
        assert not outer.outputs
        model(**inputs)
    assert not torch.equal(outer.hidden(0), inner.hidden(0))
    upstream = hf.AttentionInterface.get_interface
    with pytest.raises(RuntimeError, match="broken"), capture(model, [0]):
        raise RuntimeError("broken")
    assert hf.AttentionInterface.get_interface is upstream


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_checkpointing_records_once_and_gives_the_same_gradient(name):
    gradients = []
    for checkpointed in (False, True):
        model = build(name).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with capture(model, [1]) as captured:
            outputs = model(**batch(name))
        loss = outputs.logits.square().mean() + captured.hidden(1).square().mean()
        loss = loss + sum(x.square().mean() for x in captured.attention(1)[:3])
        loss.backward()
        assert captured.attention(1) is not None  # the recomputation was not recorded
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_reentrant_checkpointing_is_refused():
    model = build("bert").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with capture(model, [1]) as captured:
        model(**batch("bert"))
    with pytest.raises(ValueError, match="Set use_reentrant to false"):
        captured.attention(1)


def test_swin_has_hidden_states_and_no_relations():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2}
    model = hf.SwinForImageClassification(hf.SwinConfig(**sizes)).eval()
    with capture(model, [0, 1]) as captured:
        model(**batch("swin"))
    assert [tuple(captured.hidden(layer).shape) for layer in (0, 1)] == [(3, 16, 16), (3, 16, 16)]
    with pytest.raises(ValueError, match="computes attention inside windows"):
        captured.attention(0)
    with pytest.raises(ValueError, match="layer 1 of SwinForImageClassification computes attention 2 times"):
        captured.attention(1)


def test_what_cannot_be_captured_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="Linear has no transformers model inside"):
        layers_of(nn.Linear(2, 2))
    albert = hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, embedding_size=8))
    with pytest.raises(ValueError, match="computes 2 layers by 1 shared modules"):
        layers_of(albert)
    double = build("bert")
    double.more = copy.deepcopy(double.bert.encoder.layer)
    with pytest.raises(ValueError, match="several lists of layers"):
        layers_of(double)
    deberta = build("deberta_v2")
    with capture(deberta, [0]) as captured:
        deberta(**batch("deberta_v2"))
    with pytest.raises(ValueError, match=r"adds to its scores what is not recorded\. Take 'relation'"):
        captured.attention(0, probabilities=True)


def test_a_layer_that_is_dropped_is_named():
    model = build("wav2vec2", layerdrop=1.0).train()
    with capture(model, [0]) as captured:
        model(**batch("wav2vec2"))
    with pytest.raises(ValueError, match=r"`layerdrop` is 1\.0; expected 0 .*Set layerdrop to 0"):
        captured.hidden(0)


def test_a_model_inside_a_module_of_the_users_own():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = build("bert"), nn.Linear(2, 3)

        def forward(self, **inputs):
            return self.head(self.encoder(**inputs).logits)

    model = Own()
    with capture(model, [1]) as captured:
        model(**batch("bert"))
    assert captured.attention(1).query.shape == (3, 4, 6, 4)


@pytest.mark.parametrize(
    ("which", "student", "teacher", "pairs"),
    [
        ("last", 2, 12, [(1, 11)]),
        ("uniform", 3, 12, [(0, 3), (1, 7), (2, 11)]),
        ("uniform", 4, 6, [(0, 1), (1, 2), (2, 4), (3, 5)]),
        ("uniform", 3, 2, [(0, 0), (1, 1), (2, 1)]),
        ([[0, -1], [-1, 3]], 2, 12, [(0, 11), (1, 3)]),
    ],
)
def test_layer_pairs(which, student, teacher, pairs):
    assert layer_pairs(which, student, teacher) == pairs


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ([[0, 12]], "teacher layers from 0 to 11, or -1 for the last, because the teacher has 12 layers"),
        ([[-3, 0]], "student layers from 0 to 1"),
        ([[1, 0], [-1, 0]], "each pair once"),
    ],
)
def test_layers_that_do_not_exist(which, message):
    with pytest.raises(ValueError, match=message):
        layer_pairs(which, 2, 12)
