"""The fused loss on language models of transformers: each class has the numbers of full logits, or a reason why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from kd_trainer import DistillationTrainer
from kd_trainer.tasks import output_head
from tests.helpers import tiny

COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "initializer_range": 0.3,
}  # fmt: skip
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
       "shared_expert_intermediate_size": 16, "output_router_logits": True, "router_aux_loss_coef": 0.5}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
          "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
          "first_k_dense_replace": 1}  # fmt: skip
STATE = {"state_size": 4, "conv_kernel": 2, "expand": 2, "time_step_rank": 4}
MAMBA2 = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2,
          "mamba_d_ssm": 32, "mamba_chunk_size": 8, "mamba_d_conv": 2}  # fmt: skip
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQ2SEQ = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
           "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0, "decoder_start_token_id": 2}  # fmt: skip

# Class -> settings of its config beyond the common ones. What multiplies or caps logits is set so that it shows.
CLASSES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {},
    "Gemma2ForCausalLM": {"final_logit_softcapping": 5.0},
    "Gemma3ForCausalLM": {"final_logit_softcapping": 5.0},
    "MistralForCausalLM": {},
    "Phi3ForCausalLM": {},
    "PhiForCausalLM": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "GPT2LMHeadModel": NO_DROPOUT,
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {**NO_DROPOUT, "rotary_dim": 4},
    "GPTBigCodeForCausalLM": NO_DROPOUT,
    "OPTForCausalLM": {"dropout": 0.0, "ffn_dim": 16, "word_embed_proj_dim": 12},
    "BloomForCausalLM": {},
    "FalconForCausalLM": {"head_dim": None},
    "MptForCausalLM": {"expansion_ratio": 2},
    "StableLmForCausalLM": {},
    "CohereForCausalLM": {"logit_scale": 0.0625},
    "Cohere2ForCausalLM": {"logit_scale": 4.0},
    "GraniteForCausalLM": {"logits_scaling": 8.0},
    "GraniteMoeForCausalLM": {**MOE, "logits_scaling": 8.0},
    "Olmo2ForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "NemotronForCausalLM": {},
    "HyperCLOVAXForCausalLM": {"logits_scaling": 0.5},
    "MixtralForCausalLM": MOE,
    "Qwen2MoeForCausalLM": MOE,
    "Qwen3MoeForCausalLM": MOE,
    "DeepseekV3ForCausalLM": {**MOE, **LATENT, "head_dim": None, "output_router_logits": False},
    "MambaForCausalLM": STATE,
    "RwkvForCausalLM": {},
    "FalconH1ForCausalLM": {**MAMBA2, "lm_head_multiplier": 0.5},
    "RecurrentGemmaForCausalLM": {"logits_soft_cap": 5.0, "attention_window_size": 8},
    "NanoChatForCausalLM": {"final_logit_softcapping": 5.0},
    "BartForConditionalGeneration": SEQ2SEQ,
    "MBartForConditionalGeneration": SEQ2SEQ,
    "T5ForConditionalGeneration": {"num_layers": 1, "d_kv": 8, "d_ff": 16, "num_heads": 2, "dropout_rate": 0.0,
                                   "decoder_start_token_id": 0, "tie_word_embeddings": True},
    "BertForMaskedLM": BERT,
    "RobertaForMaskedLM": BERT,
    "DistilBertForMaskedLM": {"n_layers": 1, "n_heads": 2, "hidden_dim": 16, "dropout": 0.0},
    "ModernBertForMaskedLM": {"local_attention": 8, "global_attn_every_n_layers": 1},
}  # fmt: skip


def build(name: str, hidden: int) -> nn.Module:
    config_class = getattr(transformers, name).config_class
    sizes = {"hidden_size": hidden, "intermediate_size": 32, "head_dim": hidden // 2}
    if "d_model" in config_class.attribute_map.values() or name.startswith(("T5", "Bart", "MBart")):
        sizes = {"d_model": hidden}
    settings = {**COMMON, **sizes, **CLASSES[name]}
    model = getattr(transformers, name)(config_class(**{k: v for k, v in settings.items() if v is not None}))
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        nn.init.normal_(layer.weight, std=0.5 / min(1.0, settings.get("logit_scale", 1.0)))
    return model


def data_of(name: str) -> list[dict[str, Any]]:
    return tiny.rows("causal_lm" if "CausalLM" in name or "LMHead" in name else "token_classification", 24)


def run(name: str, implementation: str, tmp_path: Any, steps: int = 2) -> DistillationTrainer:
    torch.manual_seed(0)
    student, teacher = build(name, 16), build(name, 32)
    rows = [{**row, "labels": [x % tiny.VOCAB if x >= 0 else x for x in row["labels"]]} for row in data_of(name)]
    if name.startswith("MBart"):  # it wraps the last label to the front, and fails on a row without one
        rows = [{**row, "labels": [2, *row["labels"][1:]]} for row in rows]
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, data_collator=tiny.pad, train_dataset=rows, eval_dataset=rows[:11],
        args=tiny.arguments(tmp_path, kd_loss_implementation=implementation, kd_reduction="tokenmean", max_steps=steps,
                            learning_rate=0.02),
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    return trainer


KEYS = ("loss", "hard_loss", "soft_loss", "teacher_agreement", "aux_loss")


def difference(one: DistillationTrainer, other: DistillationTrainer) -> float:
    """The largest relative difference of anything logged, in training and in evaluation."""
    worst = 0.0
    for prefix in ("", "eval_"):
        for key in (*KEYS, "perplexity"):
            values, expected = tiny.logged(one, prefix + key), tiny.logged(other, prefix + key)
            assert len(values) == len(expected)
            worst = max([worst, *(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(values, expected, strict=True))])
    return worst


@pytest.mark.parametrize("name", CLASSES)
def test_the_numbers_are_those_of_full_logits(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output_head, "SMALL_VOCABULARY", 0)
    auto, full = (run(name, implementation, tmp_path) for implementation in ("auto", "full"))
    assert auto._plan.heads is not None
    assert full._plan.heads is None
    assert "the loss is computed inside the output heads: no logits are held" in capsys.readouterr().out
    assert len(tiny.logged(auto, "soft_loss")) == 2
    assert len(tiny.logged(auto, "eval_soft_loss")) == 1
    assert difference(auto, full) < 1e-5
    torch.testing.assert_close(tiny.weights(auto.model), tiny.weights(full.model), rtol=0, atol=1e-5)


# ---- heads that are not plain ----


class Changed(transformers.LlamaForCausalLM):
    """A user's model that changes its logits, which no config shows."""

    change = ""

    def forward(self, input_ids: Any, attention_mask: Any = None) -> CausalLMOutput:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows, positions = input_ids.shape
        if self.change == "flattened":
            return CausalLMOutput(logits=self.lm_head(hidden.flatten(0, 1)).view(rows, positions, -1))
        if self.change == "two calls":
            return CausalLMOutput(logits=self.lm_head(hidden) + self.lm_head(hidden.flip(-1)))
        if self.change == "without the head":
            return CausalLMOutput(logits=hidden @ self.lm_head.weight.T)
        if self.change == "last position":
            return CausalLMOutput(logits=self.lm_head(hidden[:, -1:]))
        logits = self.lm_head(hidden)
        if self.change == "a call aside":
            self.lm_head(hidden.flip(-1))
        if self.change == "by position":
            return CausalLMOutput(logits=logits + 0.1 * torch.arange(positions).view(1, -1, 1))
        if self.change == "in place of some":
            logits[:, torch.arange(positions), 3] = -1.0
        if self.change == "in evaluation":
            return CausalLMOutput(logits=logits if self.training else logits / 1.7)
        change: Any = LOGITS.get(self.change, lambda z: z)
        return CausalLMOutput(logits=change(logits))


LOGITS: dict[str, Any] = {
    "roll": lambda z: z.roll(1, -1),
    "roll of positions": lambda z: z.roll(1, 1),
    "temperature": lambda z: z / 1.7,
    "slight temperature": lambda z: z * 1.002,
    "temperature of 1.01": lambda z: z / 1.01,
    "far cap": lambda z: z.clamp(-60, 60),
    "cap": lambda z: 500 * torch.tanh(z / 500),
    "offset": lambda z: z + torch.arange(z.shape[-1]) / 10,
    "last id cut": lambda z: torch.cat((z[..., :-1], z[..., -1:] - 1), -1),
}
EVERYWHERE = [*LOGITS, "flattened", "two calls", "a call aside", "without the head", "by position", "in place of some"]


class Louder(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.002


def changed_head(model: nn.Module, change: str) -> nn.Module:
    """The head itself is changed: by its class, by a hook, or by a patch of its forward."""
    head: Any = model.lm_head
    if change == "class":
        model.lm_head = Louder(head.in_features, head.out_features, bias=False)
        model.lm_head.weight = head.weight
    elif change == "hook":
        head.register_forward_hook(lambda module, given, out: out * 1.002)
    elif change == "patch":
        plain = head.forward
        head.forward = lambda x: plain(x) * 1.002
    return model


HEADS = ["class", "hook", "patch"]


def own_pair(change: str, side: str, **config: Any) -> list[nn.Module]:
    torch.manual_seed(0)
    pair: list[Any] = [Changed(tiny.llama_config(hidden, **config)) for hidden in (16, 24)]
    changed = pair[side == "teacher"]
    changed.change = change
    if change in HEADS:
        changed_head(changed, change)
    return pair


def own_run(tmp_path: Any, implementation: str, pair: Any, **settings: Any) -> DistillationTrainer:
    torch.manual_seed(1)  # of the dropout
    settings = {"kd_reduction": "tokenmean", "max_steps": 2, **settings}
    trainer = tiny.trainer(
        "causal_lm", tmp_path / implementation, pair=pair, kd_loss_implementation=implementation, **settings
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def assert_fell_back(auto: DistillationTrainer, full: DistillationTrainer) -> None:
    assert auto._plan.heads is None
    for key in KEYS:
        assert tiny.logged(auto, key) == tiny.logged(full, key)
        assert tiny.logged(auto, f"eval_{key}") == tiny.logged(full, f"eval_{key}")
    assert torch.equal(tiny.weights(auto.model), tiny.weights(full.model))


@pytest.fixture
def auto_everywhere(monkeypatch):
    monkeypatch.setattr(output_head, "SMALL_VOCABULARY", 0)


@pytest.mark.parametrize(
    ("change", "side"),
    [
        *((change, "student") for change in [*EVERYWHERE, *HEADS]),
        *((change, "teacher") for change in ("temperature", "roll of positions", "two calls", "by position", *HEADS)),
    ],
)
def test_an_unknown_head_takes_full_logits_from_the_first_step_on(
    change, side, tmp_path, auto_everywhere, caplog, capsys
):
    config = {"attention_dropout": 0.3}  # the same is drawn
    full = own_run(tmp_path, "full", own_pair(change, side, **config))
    capsys.readouterr()
    auto = own_run(tmp_path, "auto", own_pair(change, side, **config))
    assert_fell_back(auto, full)
    printed = capsys.readouterr().out + caplog.text
    assert printed.count("full logits: ") == 1
    assert "Changed" in printed.split("full logits: ")[1]
    with pytest.raises(ValueError, match=r"`kd_loss_implementation` is 'fused'; expected 'auto' or 'full' with these"):
        own_run(tmp_path, "fused", own_pair(change, side, **config))


@pytest.mark.parametrize("change", ["temperature of 1.01", "class", "patch"])
def test_what_half_precision_would_hide_is_seen(change, tmp_path, auto_everywhere):
    """Smaller than its rounding; a patch of the head's forward is compared with the product itself."""
    pair = [model.to(torch.bfloat16) for model in own_pair(change, "student")]
    if change == "patch":
        pair[0].lm_head.forward = lambda x, plain=pair[0].lm_head.forward: plain(x) * 1.05
    assert own_run(tmp_path, "auto", pair, max_steps=1)._plan.heads is None


def test_a_second_way_is_tried_with_the_same_dropout(tmp_path, monkeypatch):
    """HyperCLOVAX multiplies by `logits_scaling`, where most divide."""
    monkeypatch.setitem(CLASSES["HyperCLOVAXForCausalLM"], "attention_dropout", 0.3)
    runs = [run("HyperCLOVAXForCausalLM", implementation, tmp_path) for implementation in ("fused", "full")]
    assert [head.scale for head in runs[0]._plan.heads] == [0.5, 0.5]
    assert difference(*runs) < 1e-5


def test_what_changes_in_evaluation_alone_is_seen_there(tmp_path, auto_everywhere, caplog):
    runs = [own_run(tmp_path, name, own_pair("in evaluation", "student")) for name in ("auto", "full")]
    assert caplog.text.count("full logits: Changed does something unknown") == 1
    for key in KEYS:
        for name in (key, f"eval_{key}"):
            assert tiny.logged(runs[0], name) == pytest.approx(tiny.logged(runs[1], name), rel=1e-5), name


def test_an_evaluation_alone_reports_why_it_takes_full_logits(tmp_path, auto_everywhere, caplog):
    student, teacher = own_pair("", "student")
    student.__class__ = ByShape
    run = tiny.trainer("causal_lm", tmp_path, pair=(student, teacher), kd_reduction="tokenmean")
    run.evaluate()
    assert caplog.text.count("full logits: ByShape cannot do without its logits") == 1
    caplog.clear()
    student.__class__ = Changed
    student.get_output_embeddings = lambda: nn.Identity()
    run = tiny.trainer("causal_lm", tmp_path, pair=(student, teacher), kd_reduction="tokenmean")
    run.evaluate()
    assert caplog.text.count("full logits: Changed has no plain linear output head") == 1


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_of_the_last_position_alone_are_refused_as_ever(side, tmp_path, auto_everywhere):
    for implementation in ("full", "auto"):
        with pytest.raises(ValueError, match=r"`teacher_model` is giving logits of shape \(8, \d+, 37\); expected"):
            own_run(tmp_path, implementation, own_pair("last position", side))


class ByShape(Changed):
    def forward(self, input_ids: Any, attention_mask: Any = None) -> CausalLMOutput:
        logits = super().forward(input_ids, attention_mask).logits
        return CausalLMOutput(logits=logits.reshape(*input_ids.shape, tiny.VOCAB))


def test_a_model_that_cannot_do_without_its_logits(tmp_path, auto_everywhere, caplog):
    runs = []
    for implementation in ("auto", "full"):
        pair = own_pair("", "student")
        pair[0].__class__ = ByShape
        runs.append(own_run(tmp_path, implementation, pair))
    assert_fell_back(*runs)
    assert caplog.text.count("full logits: ByShape cannot do without its logits (shape '[") == 1


def test_an_error_of_the_models_own_is_not_hidden(tmp_path, auto_everywhere, caplog):
    pair = own_pair("", "student")
    pair[0].model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own_run(tmp_path, "auto", pair)
    assert "forward" not in pair[0].lm_head.__dict__
    assert "full logits" not in caplog.text


def test_a_bias_that_the_config_does_not_have(tmp_path, auto_everywhere, caplog):
    """BART's `final_logits_bias` is a buffer, which checkpoints may fill."""
    runs = []
    for implementation in ("auto", "full"):
        torch.manual_seed(0)
        pair = [build("BartForConditionalGeneration", hidden) for hidden in (16, 32)]
        pair[0].final_logits_bias += torch.randn(tiny.VOCAB)
        trainer = tiny.trainer("token_classification", tmp_path, pair=pair, kd_loss_implementation=implementation)
        trainer.train()
        runs.append(trainer)
    assert_fell_back(*runs)
    assert "BartForConditionalGeneration does something unknown to the product" in caplog.text


COMPILED = "a compiled forward cannot leave its output head out"


@pytest.mark.parametrize("how", ["teacher_compile", "torch_compile", "student.compile()", "teacher.compile()"])
def test_compiled_models_take_full_logits(how, tmp_path, auto_everywhere, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    pair = own_pair("", "student")
    if how.endswith("()"):
        pair[how.startswith("teacher")].compile(backend="eager")
    settings = {how: True} if how == "teacher_compile" else {}
    trainer = tiny.trainer("causal_lm", tmp_path, pair=pair, kd_reduction="tokenmean", max_steps=1, **settings)
    trainer.args.torch_compile = how == "torch_compile"  # set in time it would compile
    trainer.train()
    assert trainer._plan.heads is None
    assert f"full logits: {COMPILED}" in capsys.readouterr().out
    trainer.kd_args.kd_loss_implementation, trainer._plan = "fused", None
    with pytest.raises(ValueError, match=COMPILED):
        trainer.evaluate()


def test_heads_on_different_devices_take_full_logits(tmp_path, auto_everywhere):
    pair = own_pair("", "student")
    pair[1].lm_head.to("meta")
    assert output_head.plain_heads(*pair, True, "auto") == (
        None, "full logits: the output heads of student and teacher are on different devices"
    )  # fmt: skip
