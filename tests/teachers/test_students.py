"""`student_from_teacher` on tiny models of the common architectures, against the teacher with layers skipped."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kd_trainer import MLPConfig, MLPForImageClassification, student_from_teacher
from kd_trainer.teachers import students
from kd_trainer.teachers.shared_memory import check_separate
from tests.helpers import tiny

LAYERS = 6
VOCAB = 37
# What most configs call the sizes; each architecture renames or adds its own.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
SLIDING.append("sliding_attention")
T5 = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 32,
}
# class -> (config, path of its stack); the config's class is the model class's own.
ONE_STACK: dict[str, tuple[dict[str, Any], str]] = {
    "LlamaForCausalLM": (GQA, "model.layers"),
    "Qwen2ForCausalLM": (
        {**GQA, "use_sliding_window": True, "sliding_window": 3, "layer_types": SLIDING},
        "model.layers",
    ),
    "Qwen3ForCausalLM": ({**GQA, "tie_word_embeddings": True}, "model.layers"),
    "MistralForCausalLM": ({**GQA, "sliding_window": 3}, "model.layers"),
    "Gemma2ForCausalLM": ({**GQA, "query_pre_attn_scalar": 8, "sliding_window": 3}, "model.layers"),
    "Gemma3ForCausalLM": (
        {**GQA, "query_pre_attn_scalar": 8, "sliding_window": 3, "layer_types": SLIDING},
        "model.layers",
    ),
    "Phi3ForCausalLM": (GQA, "model.layers"),
    "GPT2LMHeadModel": (
        {"vocab_size": VOCAB, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32, "bos_token_id": 1},
        "transformer.h",
    ),
    "GPTNeoForCausalLM": (
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_layers": LAYERS,
            "num_heads": 2,
            "attention_types": [[["global", "local"], LAYERS // 2]],
            "window_size": 3,
            "max_position_embeddings": 32,
        },
        "transformer.h",
    ),
    "GPTNeoXForCausalLM": (SIZES, "gpt_neox.layers"),
    "OPTForCausalLM": ({**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}, "model.decoder.layers"),
    "BloomForCausalLM": ({"vocab_size": VOCAB, "hidden_size": 16, "n_layer": LAYERS, "n_head": 2}, "transformer.h"),
    "SmolLM3ForCausalLM": ({**GQA, "no_rope_layers": [1, 1, 0, 1, 0, 1]}, "model.layers"),
    "MixtralForCausalLM": ({**GQA, "num_local_experts": 3}, "model.layers"),
    "BertForMaskedLM": (SIZES, "bert.encoder.layer"),
    "BertForSequenceClassification": ({**SIZES, "num_labels": 3}, "bert.encoder.layer"),
    "RobertaForSequenceClassification": ({**SIZES, "num_labels": 3}, "roberta.encoder.layer"),
    "DistilBertForSequenceClassification": (
        {"vocab_size": VOCAB, "dim": 16, "hidden_dim": 32, "n_layers": LAYERS, "n_heads": 2, "num_labels": 3},
        "distilbert.transformer.layer",
    ),
    "ViTForImageClassification": (
        {
            **{k: v for k, v in SIZES.items() if k[:6] in ("hidden", "interm", "num_hi", "num_at")},
            "image_size": 8,
            "patch_size": 4,
        },
        "vit.layers",
    ),
    "BartForCausalLM": ({**BART, "encoder_layers": LAYERS, "decoder_layers": LAYERS}, "model.decoder.layers"),
}
TWO_STACKS: dict[str, tuple[dict[str, Any], str, str]] = {
    "T5ForConditionalGeneration": (
        {**T5, "num_layers": LAYERS, "num_decoder_layers": 4},
        "encoder.block",
        "decoder.block",
    ),
    "BartForConditionalGeneration": (
        {**BART, "encoder_layers": LAYERS, "decoder_layers": LAYERS},
        "model.encoder.layers",
        "model.decoder.layers",
    ),
    "MarianMTModel": (
        {**BART, "encoder_layers": 4, "decoder_layers": LAYERS, "pad_token_id": 0, "decoder_start_token_id": 0},
        "model.encoder.layers",
        "model.decoder.layers",
    ),
}
EVERY = [*ONE_STACK, *TWO_STACKS]


def build(name: str, **kwargs: Any) -> Any:
    """A teacher whose weights are all drawn, norms and biases too, so that every layer matters."""
    model_class = getattr(transformers, name)
    sizes = {**ONE_STACK, **TWO_STACKS}[name][0]
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**sizes, **kwargs}))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):  # fixed position tables stay as they are
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def batch(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    ids = torch.randint(3, VOCAB, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids.flip(-1)} if type(model).__name__ in TWO_STACKS else inputs


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model)).logits


def skip(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """A forward hook: the layer hands on what it was given."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


def teacher_without(teacher: Any, path: str, kept: list[int]) -> Any:
    """A copy of the teacher in which the layers of a stack that are not kept do nothing."""
    reference = copy.deepcopy(teacher)
    for index, layer in enumerate(reference.get_submodule(path)):
        if index not in kept:
            layer.register_forward_hook(skip, with_kwargs=True)
    return reference


@pytest.mark.parametrize("name", ONE_STACK)
def test_a_student_computes_what_its_layers_computed(name):
    teacher, path = build(name), ONE_STACK[name][1]
    before = tiny.weights(teacher).clone()
    for layers in ([0, 2, 5], [1, 4]):
        student = student_from_teacher(teacher, layers=layers)
        assert len(student.get_submodule(path)) == len(layers)
        torch.testing.assert_close(logits(student), logits(teacher_without(teacher, path, layers)), rtol=0, atol=1e-6)
        assert (logits(student) - logits(teacher)).abs().max() > 1e-3
    assert torch.equal(before, tiny.weights(teacher))


@pytest.mark.parametrize("name", TWO_STACKS)
def test_encoder_and_decoder(name):
    teacher = build(name)
    _, encoder, decoder = TWO_STACKS[name]
    student = student_from_teacher(teacher, layers=[0, 3], decoder_layers=[0, 1, 3])
    reference = teacher_without(teacher_without(teacher, encoder, [0, 3]), decoder, [0, 1, 3])
    torch.testing.assert_close(logits(student), logits(reference), rtol=0, atol=1e-6)
    both = student_from_teacher(teacher, layers="every_2")
    lengths = [len(teacher.get_submodule(path)) for path in (encoder, decoder)]
    assert [len(both.get_submodule(path)) for path in (encoder, decoder)] == [length // 2 for length in lengths]


@pytest.mark.parametrize("name", EVERY)
def test_all_layers_make_the_teacher(name):
    teacher = build(name)
    student = student_from_teacher(teacher, layers="every_1")
    assert torch.equal(logits(student), logits(teacher))
    student_config, teacher_config = student.config.to_dict(), teacher.config.to_dict()
    assert student_config == teacher_config


@pytest.mark.parametrize("name", EVERY)
def test_it_is_saved_as_a_normal_checkpoint(name, tmp_path):
    student = student_from_teacher(build(name), layers="every_2")
    student.save_pretrained(tmp_path)
    loaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(student))
    assert loaded.num_parameters() == student.num_parameters()


@pytest.mark.parametrize("name", EVERY)
def test_it_shares_nothing_with_the_teacher(name):
    teacher = build(name)
    student = student_from_teacher(teacher.requires_grad_(False), layers="every_2")
    check_separate(student, teacher)
    teacher_memory = {t.untyped_storage().data_ptr() for t in [*teacher.parameters(), *teacher.buffers()]}
    assert not teacher_memory & {t.untyped_storage().data_ptr() for t in [*student.parameters(), *student.buffers()]}
    assert student.config is not teacher.config
    assert not student.training
    fixed = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert all("embed_positions" in name for name in fixed)  # Marian's table of sines


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "BartForConditionalGeneration"]
)
def test_it_generates_with_a_cache(name):
    """The cache is addressed by `layer_idx`: with the teacher's numbers it would have holes."""
    student = student_from_teacher(build(name), layers=[1, 4])
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    inputs = {key: value for key, value in batch(student).items() if key != "decoder_input_ids"}
    cached, plain = (student.generate(**inputs, **settings, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", EVERY)
def test_layers_have_the_numbers_of_their_places(name):
    student = student_from_teacher(build(name), layers=[0, 2, 3])
    path = {**ONE_STACK, **TWO_STACKS}[name][-1]
    for place, layer in enumerate(student.get_submodule(path)):
        assert {m.layer_idx for m in layer.modules() if getattr(m, "layer_idx", None) is not None} <= {place}


def test_lists_of_the_config_move_with_their_layers():
    gemma = student_from_teacher(build("Gemma3ForCausalLM"), layers=[0, 3, 4]).config
    assert gemma.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    smol = student_from_teacher(build("SmolLM3ForCausalLM"), layers=[2, 3, 4]).config
    assert smol.no_rope_layers == [0, 1, 0]
    neo = student_from_teacher(build("GPTNeoForCausalLM"), layers=[1, 3]).config
    assert neo.attention_layers == ["local", "local"]


def test_a_list_inside_a_layer_is_no_stack():
    """T5's layers are lists themselves, of 2 sub-layers in the encoder and 3 in the decoder."""
    teacher = build("T5ForConditionalGeneration", num_layers=2, num_decoder_layers=3)
    student = student_from_teacher(teacher, layers=[0], decoder_layers=[0, 2])
    assert (len(student.encoder.block), len(student.decoder.block)) == (1, 2)
    assert len(student.decoder.block[0].layer) == 3


def test_tokens_are_no_layers():
    """A list that only happens to be as long as the stack keeps all its entries."""
    teacher = build("LlamaForCausalLM", eos_token_id=[2, 3, 4, 5, 6, 7])
    assert student_from_teacher(teacher, layers=[0, 5]).config.eos_token_id == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("length", "spec", "kept"),
    [
        (12, "every_2", [0, 2, 4, 7, 9, 11]),  # DistilBERT's
        (12, "every_3", [0, 4, 7, 11]),
        (7, "every_3", [0, 3, 6]),
        (5, "every_2", [0, 2, 4]),
        (6, "every_5", [0, 5]),
        (6, "every_6", [0]),
        (6, "every_100", [0]),
        (1, "every_2", [0]),
        (4, "every_1", [0, 1, 2, 3]),
        (6, [5], [5]),
        (6, (1, 2), [1, 2]),
        (6, range(0, 6, 2), [0, 2, 4]),
    ],
)
def test_which_layers_are_kept(length, spec, kept):
    teacher = build("LlamaForCausalLM", num_hidden_layers=length)
    student = student_from_teacher(teacher, layers=spec)
    for layer, index in zip(student.model.layers, kept, strict=True):
        assert torch.equal(tiny.weights(layer), tiny.weights(teacher.model.layers[index]))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tied):
    student = student_from_teacher(build("LlamaForCausalLM", tie_word_embeddings=tied), layers=[0])
    assert (student.lm_head.weight is student.model.embed_tokens.weight) is tied


def test_dtype_generation_config_and_attention_are_the_teachers():
    teacher = build("T5ForConditionalGeneration").to(torch.bfloat16)
    teacher.decoder.block[3].layer[2].DenseReluDense.wo.float()  # as upstream keeps it where float16 would overflow
    teacher.generation_config.max_new_tokens = 7
    teacher.set_attn_implementation("eager")
    student = student_from_teacher(teacher, layers="every_2")
    assert student.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.bfloat16
    assert student.decoder.block[1].layer[2].DenseReluDense.wo.weight.dtype == torch.float32
    assert student.generation_config.max_new_tokens == 7
    student.generation_config.max_new_tokens = 8
    assert teacher.generation_config.max_new_tokens == 7
    assert student.config._attn_implementation == "eager"


def test_it_draws_nothing():
    teacher = build("LlamaForCausalLM")
    before = torch.get_rng_state()
    student_from_teacher(teacher, layers="every_2")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_teacher_by_path(tmp_path):
    teacher = build("BertForSequenceClassification")
    teacher.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        student = student_from_teacher(path, layers=[0, 5])
        assert type(student) is type(teacher)
        assert torch.equal(logits(student), logits(student_from_teacher(teacher, layers=[0, 5])))
        assert student.config._name_or_path == ""


def test_it_trains_beside_its_teacher(tmp_path):
    teacher = tiny.LlamaForCausalLM(tiny.llama_config(num_hidden_layers=4))
    before = tiny.weights(teacher).clone()
    student = student_from_teacher(teacher, layers="every_2")
    start = tiny.weights(student).clone()
    tiny.trainer("causal_lm", tmp_path, pair=(student, teacher), kd_reduction="tokenmean").train()
    assert torch.equal(tiny.weights(teacher), before)
    assert not torch.equal(tiny.weights(student), start)


@pytest.mark.parametrize(
    ("layers", "error", "part"),
    [
        ([0, 6], ValueError, "`layers` is [0, 6]; expected ascending layer indices from 0 to 5"),
        ([-1], ValueError, "Leave out -1."),
        ([0, 2, 2], ValueError, "Name every layer once, in the teacher's order."),
        ([2, 0], ValueError, "Name every layer once, in the teacher's order."),
        ([], ValueError, "Keep at least one layer."),
        ("every_0", ValueError, 'Write "every_2" for half of the layers.'),
        ("every_x", ValueError, 'Write "every_2" for half of the layers.'),
        ("half", ValueError, 'Write "every_2" for half of the layers.'),
        (3, TypeError, "Write the indices as a list"),
        ([0, 1.0], TypeError, "Write the indices as a list"),
        ([True], TypeError, "Write the indices as a list"),
        (None, TypeError, "Write the indices as a list"),
    ],
)
def test_wrong_layers_are_refused(layers, error, part):
    with pytest.raises(error) as caught:
        student_from_teacher(build("LlamaForCausalLM"), layers=layers)
    assert part in str(caught.value)


def test_the_decoders_layers_are_named_in_the_message():
    teacher = build("T5ForConditionalGeneration")
    with pytest.raises(ValueError, match=r"`decoder_layers` is \[4\]; expected .* from 0 to 3"):
        student_from_teacher(teacher, layers=[0], decoder_layers=[4])
    with pytest.raises(ValueError, match=r"`layers` is \[0, 5\]; expected .* from 0 to 3"):
        student_from_teacher(teacher, layers=[0, 5])  # right for the encoder alone
    with pytest.raises(ValueError, match=r"`decoder_layers` is \[0\]; expected None, because LlamaForCausalLM has one"):
        student_from_teacher(build("LlamaForCausalLM"), layers=[0], decoder_layers=[0])


def test_a_layer_that_holds_what_the_others_lack_must_stay():
    with pytest.raises(
        ValueError, match=r"relative_attention_bias.*Keep the first layers|Keep the first layers"
    ) as caught:
        student_from_teacher(build("T5ForConditionalGeneration"), layers=[1, 3])
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in str(caught.value)


def test_layers_that_change_with_their_place_are_refused():
    sizes = {**GQA, "decoder_sparse_step": 2, "num_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
    mixed = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))  # every second layer has experts
    assert len(student_from_teacher(mixed, layers=[0, 3]).model.layers) == 2
    with pytest.raises(ValueError, match=r"missing, left over or of another shape: model\.layers\.1\.mlp"):
        student_from_teacher(mixed, layers=[0, 2])
    by_depth = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**SIZES))
    assert len(student_from_teacher(by_depth, layers=[0, 1]).model.layers) == 2
    with pytest.raises(
        ValueError, match=r"self_attn.lambda_init of layer 3 is 0\.\d+ in the teacher and would be 0\.3"
    ):
        student_from_teacher(by_depth, layers=[0, 3])
    scaled = build("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)
    assert len(student_from_teacher(scaled, layers=[0, 1]).transformer.h) == 2
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        student_from_teacher(scaled, layers=[0, 3])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_run_time_switches_do_not_count_as_change(name):
    teacher = build(name).train()
    teacher.gradient_checkpointing_enable()
    student = student_from_teacher(teacher, layers=[0, 3])
    assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())


def test_a_model_without_a_plain_stack_is_refused(tmp_path):
    shared = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**SIZES, embedding_size=8))
    with pytest.raises(ValueError, match=r"AlbertForMaskedLM with these lists of modules: .*albert_layer_groups \(1\)"):
        student_from_teacher(shared, layers=[0])
    sizes = {"vocab_size": VOCAB, "emb_dim": 16, "n_layers": LAYERS, "n_heads": 2}
    with pytest.raises(ValueError, match=r"attentions \(6\).*which of them are its hidden layers cannot be told"):
        student_from_teacher(transformers.XLMWithLMHeadModel(transformers.XLMConfig(**sizes)), layers=[0])
    mlp = MLPForImageClassification(MLPConfig(hidden_sizes=[16]))
    with pytest.raises(ValueError, match="lists of modules: none"):
        student_from_teacher(mlp, layers=[0])
    mlp.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"architectures \['MLPForImageClassification'\]. Load it with its own class"):
        student_from_teacher(tmp_path, layers=[0])


def test_a_teacher_that_cannot_be_copied_is_refused():
    with pytest.raises(TypeError, match="`teacher` is Linear; expected a PreTrainedModel or a path"):
        student_from_teacher(nn.Linear(2, 2), layers=[0])
    with pytest.raises(ValueError, match="weights on the meta device"):
        student_from_teacher(build("LlamaForCausalLM").to("meta"), layers=[0])
    quantised = build("LlamaForCausalLM")
    quantised.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\)"):
        student_from_teacher(quantised, layers=[0])


def test_the_example_of_the_docstring_runs():
    results = doctest.testmod(students)
    assert results.attempted == 8
    assert results.failed == 0
