"""Kinds of teacher: the student's own base, half precision, quantised, placed by a map, compiled; checkpointing."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import json
import logging
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers.integrations.peft as integration
from packaging.version import Version
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM

from kd_trainer import DistillationTrainer, DistillationTrainingArguments, parse_args
from kd_trainer.teachers.adapter_off import AdapterOffTeacher, adapters_off
from kd_trainer.teachers.live import ADAPTER_OFF, LiveTeacher
from kd_trainer.teachers.load import load_teacher
from tests.helpers import tiny

ACCELERATOR = SimpleNamespace(autocast=contextlib.nullcontext, mixed_precision="no")
LM = {"kd_reduction": "tokenmean", "kd_temperature": 2.0}


def lora(**kwargs) -> peft.LoraConfig:
    """Adapters that are no zero to begin with, so that on and off differ from the first step on."""
    defaults = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "lora_dropout": 0.3}
    return peft.LoraConfig(**{**defaults, **kwargs})


@pytest.fixture(autouse=True)
def any_peft(monkeypatch):
    """From 5.24 on, transformers' own `add_adapter` first requires peft 0.22. With an older one that check alone fails:
    what it then calls works, and is tested. With peft 0.22 this changes nothing.
    """
    required, installed = integration.MIN_PEFT_VERSION, peft.__version__
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", min(required, installed, key=Version))


def base(seed: int = 0, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny.llama_config(**kwargs))


def with_adapters(kind: str = "peft", dropout: float = 0.0, **kwargs) -> nn.Module:
    """A LoRA student, wrapped by peft or by transformers' own `add_adapter`; the same weights every time."""
    model = base(attention_dropout=dropout)
    torch.manual_seed(1)
    if kind == "peft":
        return peft.get_peft_model(model, lora(**kwargs))
    model.add_adapter(lora(**kwargs))
    return model


def run_with(student, teacher, output_dir, **kwargs):
    kwargs = {"learning_rate": 0.2, **LM, **kwargs}
    return tiny.trainer("causal_lm", output_dir, pair=(student, teacher), **kwargs)


# ---- the student's base as the teacher ----


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["peft", "integration"])
def test_adapter_off_equals_a_copy_of_the_base(kind, checkpointing, tmp_path):
    kwargs = {"max_steps": 20, "gradient_checkpointing": checkpointing, "seed": 3}
    torch.manual_seed(5)
    off = run_with(with_adapters(kind, dropout=0.3), ADAPTER_OFF, tmp_path, **kwargs)
    off.train()
    torch.manual_seed(5)
    copied = run_with(with_adapters(kind, dropout=0.3), copy.deepcopy(base()), tmp_path, **kwargs)
    copied.train()
    for key in ("loss", "soft_loss", "hard_loss", "teacher_agreement"):
        assert tiny.logged(off, key) == pytest.approx(tiny.logged(copied, key), rel=1e-5)
    torch.testing.assert_close(tiny.weights(off.model), tiny.weights(copied.model), rtol=0, atol=1e-6)
    soft = tiny.logged(off, "soft_loss")
    assert soft[0] > 0.01
    assert abs(soft[0] - soft[-1]) > 0.01
    assert off.evaluate()["eval_soft_loss"] == pytest.approx(copied.evaluate()["eval_soft_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["peft", "integration"])
def test_the_checkpoint_holds_the_adapter_alone(kind, tmp_path):
    from safetensors.torch import load_file

    run = run_with(with_adapters(kind), ADAPTER_OFF, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    names = list(load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors"))
    assert len(names) == 4
    assert all("lora_" in name for name in names)
    assert not list((tmp_path / "checkpoint-2").glob("model*"))
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == 4


def test_no_second_copy_of_the_weights(tmp_path):
    student = with_adapters()
    held = {id(p) for p in student.parameters()}
    run = run_with(student, ADAPTER_OFF, tmp_path, max_steps=1)
    run.train()
    assert {id(p) for p in run.teacher.model.parameters()} == held


def test_the_name_works_from_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"teacher_model_name_or_path": "adapter_off", "use_cpu": True}))
    (args,) = (parse_args(DistillationTrainingArguments, argv=[str(tmp_path / "config.json"), "--output_dir", "x"]),)
    run = DistillationTrainer(model=with_adapters(), args=args, train_dataset=tiny.rows("causal_lm"))
    assert isinstance(run.teacher, AdapterOffTeacher)


def test_a_folder_of_that_name_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base(7).save_pretrained("adapter_off")
    run = run_with(with_adapters(), "./adapter_off", tmp_path)
    assert not isinstance(run.teacher, AdapterOffTeacher)
    assert torch.equal(tiny.weights(run.teacher.model), tiny.weights(base(7)))


@pytest.mark.parametrize("kind", ["peft", "integration"])
def test_everything_is_as_it_was_afterwards(kind):
    student = with_adapters(kind)
    second = lora(r=3)
    student.add_adapter("other", second) if kind == "peft" else student.add_adapter(second, "other")
    student.set_adapter("default")
    student.train()
    layers = [m for m in student.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    layers[0].train(False)  # a part in eval, a frozen adapter: set on purpose
    for name, parameter in student.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)

    def state():
        return (
            [m.training for m in student.modules()],
            [p.requires_grad for p in student.parameters()],
            [(layer.active_adapters, layer.disable_adapters, layer.merged) for layer in layers],
        )

    before = state()
    with adapters_off(student):
        assert all(layer.disable_adapters for layer in layers)
        assert not any(m.training for m in student.modules())
    assert state() == before
    with pytest.raises(KeyError), adapters_off(student):
        raise KeyError
    assert state() == before
    layers[1]._disable_adapters = True  # switched off by the user: stays off
    with adapters_off(student):
        pass
    assert [layer.disable_adapters for layer in layers] == [False, True]


def test_through_ddp(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        teach_through_ddp()
        gc.collect()  # a wrapper that outlives its process group waits at its end for gloo's threads, which wait for it
    finally:
        dist.destroy_process_group()


def teach_through_ddp() -> None:
    student = with_adapters(lora_dropout=0.0)
    wrapped = nn.parallel.DistributedDataParallel(student)
    teacher = AdapterOffTeacher(student, over_tokens=True)
    batch = {"input_ids": torch.arange(1, 9).reshape(2, 4)}
    calls: list[int] = []
    wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
    for step in range(2):
        logits = teacher(batch, ACCELERATOR, wrapped)
        assert len(calls) == 2 * step + 1  # its forward is where FSDP and DeepSpeed gather weights
        torch.testing.assert_close(logits, base()(**batch).logits.detach())
        assert not logits.requires_grad
        wrapped(**batch).logits.sub(logits).square().sum().backward()
    assert all(p.grad is not None for name, p in student.named_parameters() if "lora_" in name)


def test_the_trainer_hands_over_the_wrapped_student(tmp_path):
    run = run_with(with_adapters(), ADAPTER_OFF, tmp_path, max_steps=1)
    seen = []
    run.teacher._run = lambda inputs, student, run=run.teacher._run: seen.append(student) or run(inputs, student)
    run.train()
    assert len(seen) == 2  # the setup and the step
    assert all(student is run.model_wrapped for student in seen)


def test_model_init_makes_the_teacher_anew(tmp_path):
    run = DistillationTrainer(
        model_init=lambda: with_adapters(), teacher_model=ADAPTER_OFF, args=tiny.arguments(tmp_path, max_steps=1, **LM),
        train_dataset=tiny.rows("causal_lm"), data_collator=tiny.pad,
    )  # fmt: skip
    for _ in range(2):
        run.train()
        assert run.teacher.model is run.model


def test_modules_to_save_are_off_too(tmp_path):
    student = with_adapters(modules_to_save=["lm_head"], lora_dropout=0.0)
    run = run_with(student, ADAPTER_OFF, tmp_path, max_steps=3)
    run.train()
    batch = {"input_ids": torch.arange(1, 9).reshape(2, 4)}
    torch.testing.assert_close(run.teacher(batch, run.accelerator), base()(**batch).logits.detach())
    assert not torch.equal(student.base_model.lm_head.modules_to_save["default"].weight, base().lm_head.weight)


def test_a_student_without_adapters_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"`teacher_model` is 'adapter_off' with a student of type LlamaForCausalLM; expected a stude"
    ):
        run_with(base(), ADAPTER_OFF, tmp_path)
    prompt = peft.get_peft_model(base(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="expected a student with adapters in its layers"):
        run_with(prompt, ADAPTER_OFF, tmp_path)


def test_a_base_that_would_move_is_refused(tmp_path):
    student = with_adapters()
    student.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"a student that trains base_model\.model\.model\.norm\.weight; .*Freeze them"
    ):
        run_with(student, ADAPTER_OFF, tmp_path)
    student = with_adapters()
    name, layer = next((n, m) for n, m in student.named_modules() if n.endswith("q_proj"))
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=f"a student that trains {name}.base_layer.weight"):
        run_with(student, ADAPTER_OFF, tmp_path)


def classifier(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny.bert_config(initializer_range=0.5))
    return peft.get_peft_model(model, lora(target_modules=["query"], **kwargs))


def test_a_classifier_that_peft_trains_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"a classifier in modules_to_save \(base_model\.model\.classifier\); expected"
    ):
        tiny.trainer("classification", tmp_path, pair=(classifier(task_type="SEQ_CLS"), ADAPTER_OFF))
    run = tiny.trainer("classification", tmp_path, pair=(classifier(), ADAPTER_OFF), max_steps=1)
    run.train()
    assert tiny.logged(run, "soft_loss")[0] > 0


@pytest.mark.parametrize("option", [{"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, {"teacher_compile": True}])
def test_options_of_another_teacher_are_refused(option, tmp_path):
    with pytest.raises(
        ValueError, match=rf"`{next(iter(option))}` is .*; expected nothing with the teacher 'adapter_off'"
    ):
        run_with(with_adapters(), ADAPTER_OFF, tmp_path, **option)


def test_a_lora_student_with_a_teacher_by_path(tmp_path):
    """The wrapper of peft is no model of an Auto class; what it wraps is."""
    base(7).save_pretrained(tmp_path / "teacher")
    run = run_with(with_adapters(), str(tmp_path / "teacher"), tmp_path, max_steps=1)
    run.train()
    assert torch.equal(tiny.weights(run.teacher.model), tiny.weights(base(7)))
    assert run._plan.task.name == "causal_lm"


def test_the_start_block_says_so(tmp_path, capsys):
    run_with(with_adapters(), ADAPTER_OFF, tmp_path, max_steps=1).train()
    assert "[kd_trainer] the teacher is the student with its adapters off" in capsys.readouterr().out


# ---- dtypes, quantisation, placement ----


@pytest.fixture
def teacher_folder(tmp_path):
    LlamaForCausalLM(tiny.llama_config(64, num_attention_heads=4)).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_a_bf16_teacher(teacher_folder, tmp_path):
    run = run_with(base(), teacher_folder, tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"}, max_steps=1)
    run.train()
    batch = tiny.pad(tiny.rows("causal_lm")[:8])
    logits = run.teacher(batch, run.accelerator)
    assert logits.dtype == torch.bfloat16
    # The soft loss is that of exactly these logits: softmax and sums are wider.
    z_s = base()(**batch).logits.detach()
    mask = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
    log_q, log_p = (z.double().div(2.0).log_softmax(-1)[mask] for z in (z_s, logits))
    expected = 4 * nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert tiny.logged(run, "soft_loss")[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_teacher_placed_by_a_map_is_not_moved(device_map, teacher_folder, tmp_path, monkeypatch):
    plain = run_with(base(), teacher_folder, tmp_path)
    mapped = run_with(base(), teacher_folder, tmp_path, teacher_model_init_kwargs={"device_map": device_map})
    monkeypatch.setattr(mapped.teacher.model, "to", lambda *a: pytest.fail("moved"))
    for run in (plain, mapped):
        run.train()
    assert tiny.logged(plain, "loss") == tiny.logged(mapped, "loss")


def test_the_batch_goes_where_its_loader_placed_the_teacher():
    class Spy(nn.Module):
        def forward(self, x):
            self.device = x.device
            return x

    spy = Spy()
    spy.weight = nn.Parameter(torch.zeros((), device="meta"))
    spy.hf_device_map = {"": "meta"}
    teacher = LiveTeacher(spy)
    teacher.prepare(torch.device("cpu"))
    teacher({"x": torch.ones(2, 3)}, ACCELERATOR)
    assert spy.device.type == "meta"
    spy.hf_device_map = {"a": "cpu", "b": "meta"}  # accelerate's hooks move the inputs of several devices
    teacher = LiveTeacher(spy)
    teacher.prepare(torch.device("cpu"))
    teacher({"x": torch.ones(2, 3)}, ACCELERATOR)
    assert spy.device.type == "cpu"


def test_a_quantisation_from_json_reaches_upstream(teacher_folder, tmp_path, monkeypatch):
    """Whether or not bitsandbytes is here: upstream makes its own config object of the JSON object."""
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    made = []

    def stop(self, *args, **kwargs):
        made.append(self.quantization_config)
        raise ImportError("no bitsandbytes")

    monkeypatch.setattr(Bnb4BitHfQuantizer, "validate_environment", stop)
    given = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}}
    with pytest.raises(ValueError, match=r"`teacher_model_init_kwargs` is .*ImportError: no bitsandbytes") as caught:
        run_with(base(), teacher_folder, tmp_path, teacher_model_init_kwargs=json.dumps(given))
    assert "typing error" not in str(caught.value)
    assert AutoHfQuantizer.supports_quant_method(given["quantization_config"])
    assert made[0].load_in_4bit
    assert made[0].bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed here")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_teacher(bits, teacher_folder, tmp_path):
    kwargs = {"quantization_config": {f"load_in_{bits}bit": True}}
    run = run_with(base(), teacher_folder, tmp_path, teacher_model_init_kwargs=kwargs)
    assert run.teacher.model.model.layers[0].self_attn.q_proj.weight.dtype == {4: torch.uint8, 8: torch.int8}[bits]
    run.train()
    exact = run_with(base(), teacher_folder, tmp_path)
    exact.train()
    quantised, expected = (tiny.logged(r, "soft_loss") for r in (run, exact))
    assert quantised != expected
    assert quantised == pytest.approx(expected, rel=0.2)


def test_the_logits_can_be_saved_for_backward(teacher_folder):
    """As tensors of `torch.inference_mode` cannot."""
    teacher = LiveTeacher(load_teacher(teacher_folder, base(), {}))
    teacher.prepare(torch.device("cpu"))
    logits = teacher({"input_ids": torch.ones(1, 3, dtype=torch.long)}, ACCELERATOR)
    assert not logits.is_inference()
    z = torch.ones_like(logits, requires_grad=True)
    (z * logits).sum().backward()
    assert torch.equal(z.grad, logits)


# ---- compiled ----


@pytest.fixture
def eager_backend(monkeypatch):
    """`torch.compile` without its compiler: what is traced runs as it is; counts the graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=backend))
    yield graphs
    torch.compiler.reset()


def test_a_compiled_teacher_gives_the_same_run(tmp_path, eager_backend):
    runs = []
    for compiled in (False, True):
        runs.append(tiny.trainer("causal_lm", tmp_path, teacher_compile=compiled, **LM))
        assert not eager_backend
        runs[-1].train()
    assert eager_backend
    graphs = len(eager_backend)
    runs[1].evaluate()
    for key in ("loss", "soft_loss"):
        assert tiny.logged(runs[1], key) == pytest.approx(tiny.logged(runs[0], key), rel=1e-6)
    assert list(runs[1].teacher.model.state_dict()) == list(runs[0].teacher.model.state_dict())
    assert len(eager_backend) <= graphs + 2  # not one for every shape


@pytest.mark.trains
def test_a_teacher_compiled_by_inductor(tmp_path, caplog):
    """With a compiler the numbers agree; without one the run goes on and warns once: either is right."""
    data = [{"input_ids": list(range(1, 8)), "labels": list(range(1, 8))}] * 16  # one shape: compiling takes seconds
    kwargs = {"max_steps": 2, "data": data, **LM}
    runs = [tiny.trainer("causal_lm", tmp_path, teacher_compile=c, **kwargs) for c in (False, True)]
    for run in runs:
        run.train()
    assert tiny.logged(runs[1], "soft_loss") == pytest.approx(tiny.logged(runs[0], "soft_loss"), rel=1e-5)
    warnings = [record for record in caplog.records if "teacher_compile" in record.message]
    assert len(warnings) == (0 if runs[1].teacher.compiled else 1)


def test_without_a_compiler_the_run_goes_on_and_warns_once(tmp_path, caplog):
    import torch._inductor.config as inductor

    torch.compiler.reset()
    run = tiny.trainer("causal_lm", tmp_path, teacher_compile=True, max_steps=2, **LM)
    no_compiler = inductor.patch({"cpp.cxx": (None, "/no/such/compiler"), "force_disable_caches": True})
    with no_compiler, caplog.at_level(logging.WARNING, logger="kd_trainer"):
        run.train()
    torch.compiler.reset()
    warnings = [record.message for record in caplog.records if record.name.startswith("kd_trainer")]
    assert len(warnings) == 1
    assert warnings[0].startswith("teacher_compile: the teacher runs uncompiled, because torch.compile raised: ")
    assert "\n" not in warnings[0]
    plain = tiny.trainer("causal_lm", tmp_path, max_steps=2, **LM)
    plain.train()
    assert tiny.logged(run, "loss") == tiny.logged(plain, "loss")


def test_an_error_of_the_teacher_itself_is_not_the_compilers(tmp_path, eager_backend):
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    teacher = LiveTeacher(Broken(), compiled=True)
    teacher.prepare(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="broken"):
        teacher({"x": torch.ones(2, 3)}, ACCELERATOR)


# ---- gradient checkpointing of the student ----


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_gradient_checkpointing_changes_nothing(task, tmp_path):
    kwargs = LM if task == "causal_lm" else {}
    calls = []
    runs = []
    for checkpointing in (False, True):
        run = tiny.trainer(task, tmp_path, gradient_checkpointing=checkpointing, **kwargs)
        inner = next(m for name, m in run.model.named_modules() if name.endswith(("self_attn", "attention.self")))
        inner.register_forward_pre_hook(lambda *a, c=checkpointing: calls.append(c))
        run.train()
        runs.append(run)
    assert calls.count(True) > calls.count(False)  # forward passes made again in backward
    assert tiny.logged(runs[1], "loss") == pytest.approx(tiny.logged(runs[0], "loss"), rel=1e-6)
    torch.testing.assert_close(tiny.weights(runs[1].model), tiny.weights(runs[0].model), rtol=0, atol=1e-6)
