"""`teachers/sharding.py`: a teacher under FSDP2 and ZeRO-3 is sharded, and a run there is a run in one process.

The two processes are real ones (gloo), started by `accelerate launch`; tests/helpers/backend_run.py is what they run.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from transformers import BertForMaskedLM

from kd_trainer.teachers import sharding as backends
from tests.helpers import backend_run, launch, tiny

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
EVERYWHERE = ["same_layers", "other_layers", "by_path", "plain", "bf16", "plain_bf16", "resumed"]
EVERYWHERE += ["fused", "fused_other_layers", "fused_bf16", "own_loss", "features", "features_resumed", "student_rows"]
EVERYWHERE += ["embedding_resumed"]
OTHERS = ["adapter_off", "unknown_head"]
RUNS = {
    "fsdp2": [*EVERYWHERE, *OTHERS], "zero3": [*EVERYWHERE, "evaluated", *OTHERS],
    "zero2": ["plain_bf16", "embedding_resumed"],
}  # fmt: skip
IN_DDP = ["features", "features_resumed", "embedding_resumed", "student_rows"]
WRAPPERS = {
    "fsdp2": ("FSDPModule", "FSDPModule"),
    "zero3": ("DeepSpeedEngine", "DeepSpeedEngine"),
    "zero2": ("DeepSpeedEngine", "Plain"),
    "ddp": ("DistributedDataParallel", "LlamaForCausalLM"),
}


def cases(backend: str, names: list[str]) -> list:
    marks = [needs_deepspeed] if backend.startswith("zero") else []
    return [pytest.param(backend, name, id=f"{backend}-{name}", marks=marks) for name in names]


ALL = [
    row for backend, names in RUNS.items() for row in cases(backend, [n for n in names if n in backend_run.OWN_TEACHER])
]
SHARDED = [row for row in ALL if row.values[0] != "zero2"]
EXACT = [row for row in SHARDED if "bf16" not in row.values[1] and row.values[1] != "evaluated"]
EMBEDDING = [row for backend in RUNS for row in cases(backend, ["embedding_resumed"])]
EXACT += [*cases("ddp", IN_DDP), *EMBEDDING]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(backend, case) -> the folder with what two processes made of the case; every backend is started once."""

    def make(backend: str, out: Path) -> None:
        for kind in ("llama", "gpt2"):
            backend_run.pair(kind)[1].save_pretrained(out / kind)
        launch.two_processes("backend_run.py", str(out), backend, *RUNS.get(backend, IN_DDP))

    def folder(backend: str, case: str) -> Path:
        return launch.once(tmp_path_factory, backend, functools.partial(make, backend)) / case

    return folder


@functools.cache
def in_one_process(case: str, folder: Path):
    """The same run in this process alone: (weights, logs)."""
    if case == "by_path":
        backend_run.pair("gpt2")[1].save_pretrained(folder / "gpt2")
    run = backend_run.build(case, folder, folder / "run")
    run.train()
    return run.model.state_dict(), tiny.logs(run), run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return lambda case: in_one_process(case, tmp_path_factory.getbasetemp())


def facts_of(folder: Path) -> list[dict]:
    return [json.loads((folder / f"process_{i}.json").read_text()) for i in range(2)]


@pytest.mark.launch
@pytest.mark.parametrize(("backend", "case"), EXACT)
def test_two_processes_give_what_one_gives(backend, case, results, alone):
    weights, logs, _ = alone(case)
    saved = load_file(results(backend, case) / "saved" / "model.safetensors")
    assert set(saved) == set(weights)  # trap 16: the checkpoint is the student's alone
    for name, value in saved.items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)
    for found in facts_of(results(backend, case)):
        assert found["world_size"] == 2
        assert WRAPPERS[backend][0] in found["student_wrapper"]
        for key in tiny.LOGGED:
            expected = logs[key][3:] if case in backend_run.RESUMED and len(found["logs"][key]) == 3 else logs[key]
            assert found["logs"][key] == pytest.approx(expected, rel=1e-5, abs=1e-5), key
    start = backend_run.pair(backend_run.CASES[case].teacher)[0].state_dict()
    assert max((saved[name] - start[name]).abs().max() for name in saved) > 1e-3  # it did learn something


@pytest.mark.launch
@pytest.mark.parametrize(("backend", "case"), [row for row in EXACT if "fused" in row.values[1]])
def test_the_fused_loss_in_two_processes_is_full_logits_in_one(backend, case, results, alone):
    weights, logs, run = alone({"fused": "same_layers", "fused_other_layers": "other_layers"}[case])
    assert run._plan.heads is None
    for name, value in load_file(results(backend, case) / "saved" / "model.safetensors").items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)
    for found in facts_of(results(backend, case)):
        assert found["fused"]
        for key in tiny.LOGGED:
            assert found["logs"][key] == pytest.approx(logs[key], rel=1e-5, abs=1e-5), key


@pytest.mark.launch
@pytest.mark.parametrize(("backend", "case"), [*cases("fsdp2", ["adapter_off"]), *cases("zero3", ["adapter_off"])])
def test_the_students_own_base_teaches_in_two_processes_as_in_one(backend, case, results, alone):
    weights, logs, _ = alone(case)
    adapters = {name.replace(".default", ""): w for name, w in weights.items() if "lora_" in name}
    saved = load_file(results(backend, case) / "saved" / "adapter_model.safetensors")
    assert saved.keys() == adapters.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, adapters[name], rtol=0, atol=1e-5)
    for found in facts_of(results(backend, case)):
        assert WRAPPERS[backend][0] in found["student_wrapper"]
        for key in tiny.LOGGED:
            assert found["logs"][key] == pytest.approx(logs[key], rel=1e-5, abs=1e-5), key
    start = backend_run.pair("lora")[0].state_dict()
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3  # it did learn something


@pytest.mark.launch
@pytest.mark.parametrize(("backend", "case"), [*cases("fsdp2", ["unknown_head"]), *cases("zero3", ["unknown_head"])])
def test_an_unknown_head_falls_back_in_every_process(backend, case, results):
    assert not any(found["fused"] for found in facts_of(results(backend, case)))


@pytest.mark.launch
@pytest.mark.parametrize(("backend", "case"), [row for row in ALL if "bf16" in row.values[1]])
def test_mixed_precision_reaches_the_teacher(backend, case, results, alone):  # traps 18, 32
    _, logs, _ = alone(case)
    for found in facts_of(results(backend, case)):
        assert found["teacher_dtype"] == "torch.bfloat16"
        assert found["logs"]["loss"] == pytest.approx(logs["loss"], rel=0.02)


@pytest.mark.launch
@pytest.mark.parametrize(("backend", "case"), ALL)
def test_the_teacher_is_wrapped_and_left_alone(backend, case, results):  # traps 16, 17, 30
    for found in facts_of(results(backend, case)):
        student, teacher = WRAPPERS[backend]
        assert found["world_size"] == 2
        assert student in found["student_wrapper"]
        assert teacher in found["teacher_wrapper"]
        assert found["known_models"] == [True]  # the student's wrapper, and nothing else
        assert found["unchanged"]
        assert not found["teacher_training"]
        assert found["teacher_gradients"] == []


@pytest.mark.launch
@pytest.mark.parametrize(("backend", "case"), SHARDED)
def test_every_parameter_of_the_teacher_is_sharded(backend, case, results):  # trap 31
    both = facts_of(results(backend, case))
    assert sum(found["share"] for found in both) == pytest.approx(1, abs=0.1)  # an odd size is padded
    for found in both:
        assert found["gathered"] == []  # after a forward pass, and without a backward that would free them
        assert found.get("persistent", []) == []  # whole in every process while training, as small ones are by default
        assert 0.35 < found["share"] < 0.65
        if case != "evaluated":
            assert found["only_student_optimized"]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("case", "layer", "count"), [("same_layers", "LlamaDecoderLayer", 3), ("by_path", "GPT2Block", 2)]
)
def test_fsdp2_shards_the_teacher_by_its_own_layers(case, layer, count, results):  # trap 29
    for found in facts_of(results("fsdp2", case)):
        assert found["units"].count(layer) == count
        assert found["policy"] == [["LlamaDecoderLayer"], ["LlamaDecoderLayer"]]  # the student's is back


@pytest.mark.launch
@needs_deepspeed
def test_zero3_trains_nothing_of_the_teacher(results):
    for found in facts_of(results("zero3", "other_layers")):
        assert found["student_config_has"] != found["teacher_config_has"]
        assert set(found["teacher_config_has"]) <= {
            *backends.TEACHER_KEYS, "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}  # fmt: skip


@pytest.mark.launch
@pytest.mark.parametrize(("backend", "case"), [*cases("fsdp2", ["same_layers"]), *cases("zero3", ["same_layers"])])
def test_two_processes_evaluate_as_one(backend, case, results, alone):
    metrics = alone(case)[2].evaluate(tiny.rows("causal_lm", 24, seed=2))
    for found in facts_of(results(backend, case)):
        for name in ("eval_loss", "eval_hard_loss", "eval_soft_loss", "eval_teacher_agreement"):
            assert found["evaluation"][name] == pytest.approx(metrics[name], rel=1e-4), name


@pytest.mark.launch
@needs_deepspeed
def test_zero3_evaluates_before_any_training(results, tmp_path):
    metrics = backend_run.build("evaluated", tmp_path, tmp_path).evaluate(tiny.rows("causal_lm", 24, seed=2))
    for found in facts_of(results("zero3", "evaluated")):
        assert found["evaluation"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
        assert found["evaluation"]["eval_soft_loss"] == pytest.approx(metrics["eval_soft_loss"], rel=1e-5)


def test_evaluation_first_leaves_the_student_its_autocast(tmp_path):  # trap 17
    run = tiny.trainer("causal_lm", tmp_path, bf16=True)
    dtypes = []
    run.model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    run.evaluate()
    assert set(dtypes) == {torch.bfloat16}
    assert [known is run.model for known in run.accelerator._models] == [True]


# ---- without processes ----


def accelerator(**state) -> SimpleNamespace:
    return SimpleNamespace(is_fsdp2=False, mixed_precision="no", state=SimpleNamespace(**state))


@pytest.mark.parametrize("given", [None, accelerator(), accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=2))])
def test_elsewhere_the_teacher_is_whole_and_itself(given):
    model = tiny.Plain()
    before = copy.deepcopy(model.state_dict())
    assert backends.prepare_teacher(model, torch.device("cpu"), given) is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert backends.prepare_teacher(tiny.Plain(), torch.device("meta"), given).linear.weight.device.type == "meta"


def test_fsdp_1_that_loads_weights_in_one_process_alone_is_refused():
    given = accelerator(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=True))
    given.num_processes = 1
    assert isinstance(backends.prepare_teacher(tiny.Plain(), torch.device("cpu"), given), tiny.Plain)
    given.num_processes = 2
    with pytest.raises(ValueError, match=r"cpu_ram_efficient_loading.*FSDP 1") as error:
        backends.prepare_teacher(tiny.Plain(), torch.device("cpu"), given)
    assert '"version": 2' in str(error.value)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_whole_teacher_under_deepspeed_has_its_dtype(precision, dtype):  # trap 32
    model = nn.BatchNorm1d(3)
    given = accelerator(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    given.mixed_precision = precision
    backends.prepare_teacher(model, torch.device("cpu"), given)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.running_mean.dtype == torch.float32  # as DeepSpeed keeps the student's buffers
    given.state.deepspeed_plugin = None  # autocast does it there
    whole = backends.prepare_teacher(nn.Linear(2, 2), torch.device("cpu"), given)
    assert whole.weight.dtype == torch.float32


def test_layer_classes():
    assert backends.layer_classes(tiny.models("causal_lm")[1]) == ["LlamaDecoderLayer"]
    assert backends.layer_classes(backend_run.pair("gpt2")[1]) == ["GPT2Block"]
    bert = BertForMaskedLM(tiny.bert_config())
    assert "BertEmbeddings" in bert._no_split_modules
    assert backends.layer_classes(bert) == ["BertLayer"]  # its embedding is tied to the head
    bert._no_split_modules = ["BertLayer", "NotInThisModel"]
    assert backends.layer_classes(bert) == ["BertLayer"]  # upstream stumbles over names that are not there
    assert backends.layer_classes(tiny.Plain()) == []


def test_the_wrap_policy_is_the_teachers_and_then_the_students_again():
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={nn.Linear})
    plugin = SimpleNamespace(auto_wrap_policy=policy, transformer_cls_names_to_wrap=["Linear"])
    teacher = backend_run.pair("gpt2")[1]

    def inside():
        with backends._wrap_policy_of(teacher, plugin):
            assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
            assert plugin.transformer_cls_names_to_wrap == ["GPT2Block"]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        inside()
    assert plugin.auto_wrap_policy is policy
    assert plugin.transformer_cls_names_to_wrap == ["Linear"]


@pytest.mark.parametrize("policy", [None, functools.partial(size_based_auto_wrap_policy, min_num_params=9)])
def test_a_policy_that_fits_every_model_is_kept(policy):
    plugin = SimpleNamespace(auto_wrap_policy=policy, transformer_cls_names_to_wrap=None)
    with backends._wrap_policy_of(tiny.models("causal_lm")[1], plugin):
        assert plugin.auto_wrap_policy is policy
        assert plugin.transformer_cls_names_to_wrap is None


def test_the_teachers_deepspeed_config():
    student = {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0, "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"},
        "wandb": {"enabled": True}, "bf16": {"enabled": False}, "aio": {"block_size": 1},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
            "reduce_bucket_size": "auto"},
    }  # fmt: skip
    before = copy.deepcopy(student)
    config = backends.zero3_config(student, tiny.Plain())
    assert config == {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "bf16": {"enabled": False},
        "aio": {"block_size": 1}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    config["zero_optimization"]["offload_param"]["device"] = "nvme"
    assert student == before


@pytest.mark.parametrize(("dtype", "key"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_a_teacher_in_half_precision_keeps_it_under_zero3(dtype, key):
    teacher = tiny.Plain().to(dtype)
    zero = {"zero_optimization": {"stage": 3}}
    assert backends.zero3_config(zero, teacher)[key] == {"enabled": True}
    assert backends.zero3_config({**zero, "bf16": {"enabled": False}}, teacher)[key] == {"enabled": True}
    config = backends.zero3_config({**zero, "bf16": {"enabled": True}}, teacher)
    assert (config["bf16"], "fp16" in config) == ({"enabled": True}, False)
    assert not {"bf16", "fp16"} & set(backends.zero3_config(zero, tiny.Plain()))


@needs_deepspeed
def test_experts_are_gathered_together(monkeypatch):
    import deepspeed

    model = nn.Sequential(tiny.Plain(), nn.Linear(2, 2))
    monkeypatch.setattr(deepspeed, "initialize", lambda model, config: (model, config, None, None))
    zero = {"zero_optimization": {"stage": 3}}
    plugin = SimpleNamespace(zero_stage=3, transformer_moe_cls_names="OnlyInTheStudent,Plain", deepspeed_config=zero)
    assert backends.prepare_teacher(model, torch.device("cpu"), accelerator(deepspeed_plugin=plugin)) is model
    assert deepspeed.utils.z3_leaf_module(model[0])
    assert not deepspeed.utils.z3_leaf_module(model[1])
