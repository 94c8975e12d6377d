"""`shared_memory.py`: a teacher whose memory the student's training changes is refused; frozen shared parts are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification

from kd_trainer import DistillationTrainer
from kd_trainer.teachers.shared_memory import _Memory, check_separate
from tests.helpers import tiny

SHARES = "is a model that shares .* with the student"


def test_the_student_cannot_teach_itself():
    student = tiny.Plain()
    with pytest.raises(ValueError, match=r"is the student itself; expected a second model.*copy\.deepcopy"):
        check_separate(student, student)
    assert check_separate(student, copy.deepcopy(student)) == {}


# ---- parameters ----


def one_parameter(student, teacher):
    teacher.linear.weight = student.linear.weight


def assigned(student, teacher):
    student.load_state_dict(teacher.state_dict(), assign=True)


def same_data(student, teacher):
    teacher.linear.weight.data = student.linear.weight.data


def a_view(student, teacher):
    teacher.linear.weight = nn.Parameter(student.linear.weight.detach().view(-1)[:6].view(1, 6))


def a_slice(student, teacher):
    teacher.linear.bias = nn.Parameter(student.linear.weight.detach()[2, 1:6])


def transposed(student, teacher):
    teacher.linear.weight = nn.Parameter(student.linear.weight.detach().t())


def read_as_another_dtype(student, teacher):
    teacher.linear.bias = nn.Parameter(student.linear.weight.detach().view(torch.bfloat16)[0, 3:8])


def as_a_buffer(student, teacher):
    teacher.register_buffer("scale", student.linear.bias.detach()[1:3])


@pytest.mark.parametrize(
    "share", [one_parameter, assigned, same_data, a_view, a_slice, transposed, read_as_another_dtype, as_a_buffer]
)
def test_memory_that_the_student_trains_is_refused(share):
    student, teacher = tiny.Plain(), tiny.Plain()
    share(student, teacher)
    with pytest.raises(ValueError, match=SHARES + r".*\(linear\.(weight|bias)\); expected memory of its own there"):
        check_separate(student, teacher)
    student.requires_grad_(False)
    check_separate(student, teacher)  # then nothing moves


def test_a_tied_output_head_is_refused_though_only_the_embedding_was_assigned():
    student, teacher = (LlamaForCausalLM(tiny.llama_config(tie_word_embeddings=True)) for _ in range(2))
    teacher.lm_head = nn.Linear(16, tiny.VOCAB, bias=False)
    teacher.lm_head.weight = nn.Parameter(student.model.embed_tokens.weight.detach())
    with pytest.raises(ValueError, match=SHARES):
        check_separate(student, teacher)


def test_neighbours_in_one_block_of_memory_are_apart():
    block = torch.randn(2, 5, 6)
    columns = torch.randn(5, 12)
    student, teacher = tiny.Plain(), tiny.Plain()
    student.linear.weight, teacher.linear.weight = (nn.Parameter(part) for part in block)
    check_separate(student, teacher)
    student.linear.weight, teacher.linear.weight = nn.Parameter(columns[:, :6]), nn.Parameter(columns[:, 6:])
    check_separate(student, teacher)
    teacher.linear.weight = nn.Parameter(columns[:, 5:11])
    with pytest.raises(ValueError, match=SHARES):
        check_separate(student, teacher)


def test_tensors_without_memory_are_not_compared():
    with torch.device("meta"):
        student, teacher = tiny.Plain(), tiny.Plain()
    check_separate(student, teacher)
    teacher.linear.weight = student.linear.weight
    with pytest.raises(ValueError, match=SHARES):
        check_separate(student, teacher)
    student, teacher = tiny.Plain(), tiny.Plain()
    for model in (student, teacher):
        model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    check_separate(student, teacher)


def test_memory_inside_wrapper_tensors_is_compared():
    from torch.testing._internal.two_tensor import TwoTensor

    inner = torch.randn(3)
    wrapped = TwoTensor(torch.randn(3), inner)
    assert _Memory([wrapped]).has(inner[1:])
    assert not _Memory([wrapped]).has(torch.randn(3))
    partitioned = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves a parameter
    partitioned.ds_tensor = inner
    assert _Memory([inner]).has(partitioned)


# ---- what may be shared ----


def classifiers() -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    return tiny.models("classification")[0], tiny.models("classification", seed=3)[0]


def test_a_frozen_embedding_may_be_shared(tmp_path):
    student, teacher = classifiers()
    student.bert.embeddings = teacher.bert.embeddings.requires_grad_(False)  # its position_ids are shared too
    assert "bert.embeddings.position_ids" in check_separate(student, teacher)
    before = copy.deepcopy(teacher.state_dict())
    run = tiny.trainer("classification", tmp_path, pair=(student, teacher), max_steps=3)
    run.train()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert len(set(tiny.logged(run, "soft_loss"))) == 3
    teacher.bert.embeddings.requires_grad_(True)
    with pytest.raises(ValueError, match=SHARES):
        tiny.trainer("classification", tmp_path, pair=(student, teacher))


def test_a_shared_frozen_module_keeps_the_students_mode(tmp_path):
    student, teacher = classifiers()
    student.bert.embeddings = teacher.bert.embeddings.requires_grad_(False)
    student.bert.embeddings.dropout.p = 0.5
    seen = []
    student.bert.embeddings.dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    tiny.trainer("classification", tmp_path, pair=(student, teacher), max_steps=2).train()
    assert seen[-4:] == [False, True] * 2  # the teacher's, then the student's


def test_an_adapter_student_still_shares_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    student = tiny.models("causal_lm")[0]
    student = peft.get_peft_model(student, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    run = DistillationTrainer(
        model=student, teacher_model="adapter_off", args=tiny.arguments(tmp_path, max_steps=1),
        data_collator=tiny.pad, train_dataset=tiny.rows("causal_lm"),
    )  # fmt: skip
    run.train()
    with pytest.raises(ValueError, match=SHARES):  # the base holds the adapters too
        tiny.trainer("causal_lm", tmp_path, pair=(student, student.base_model.model))


# ---- buffers ----


def resnets() -> tuple[ResNetForImageClassification, ResNetForImageClassification]:
    config = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return tuple(ResNetForImageClassification(ResNetConfig(**config)) for _ in range(2))  # type: ignore[return-value]


class StaysInEval(ResNetForImageClassification):
    def train(self, mode: bool = True):
        super().train(mode)
        self.resnet.eval()
        return self


def test_shared_running_statistics_are_refused_though_all_parameters_are_frozen():
    student, teacher = resnets()
    student.resnet = teacher.resnet.requires_grad_(False)
    with pytest.raises(ValueError, match=r"shares \d+ buffers with the student \(resnet\..*running_mean\)"):
        check_separate(student, teacher)
    student.__class__ = StaysInEval
    mode = [module.training for module in student.modules()]
    assert check_separate(student, teacher)
    assert [module.training for module in student.modules()] == mode


class Counts(nn.Module):
    """A student that keeps a buffer of its own: a constant, or something that its forward in training moves."""

    def __init__(self, moves: str = "") -> None:
        super().__init__()
        self.linear, self.moves = nn.Linear(6, tiny.CLASSES), moves
        self.register_buffer("scale", torch.ones(6))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training and self.moves == "in place":
            self.scale.mul_(0.9).add_(0.1 * features.detach().mean(0))
        if self.training and self.moves == ".data":
            self.scale.data.mul_(0.9)
        return self.linear(features * self.scale)


@pytest.mark.parametrize("moves", ["", "in place", ".data"])
def test_another_shared_buffer_is_refused_once_a_forward_moves_it(moves, tmp_path):
    student, teacher = Counts(moves), Counts()
    student.scale = teacher.scale
    run = tiny.trainer("plain", tmp_path, pair=(student, teacher))
    run.evaluate()  # a constant in evaluation for both
    before = student.linear.weight.detach().clone()
    if not moves:
        run.train()
        assert not student._forward_hooks
        return
    with pytest.raises(ValueError, match=r"shares 1 buffers with the student, whose forward updates them \(scale\)"):
        run.train()
    assert torch.equal(student.linear.weight, before)  # no step was taken


# ---- when ----


def test_memory_shared_after_the_constructor_is_seen_before_the_first_step(tmp_path):
    student, teacher = tiny.Plain(), tiny.Plain()
    run = tiny.trainer("plain", tmp_path, pair=(student, teacher))
    student.load_state_dict(teacher.state_dict(), assign=True)
    with pytest.raises(ValueError, match=SHARES):
        run.train()


def test_a_student_from_model_init_is_compared_too(tmp_path):
    teacher = tiny.Plain()

    def model_init():
        student = tiny.Plain()
        if made:
            student.load_state_dict(teacher.state_dict(), assign=True)
        made.append(student)
        return student

    made: list[nn.Module] = []
    run = DistillationTrainer(
        model_init=model_init, teacher_model=teacher, args=tiny.arguments(tmp_path), data_collator=tiny.pad,
        train_dataset=tiny.rows("plain"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=SHARES):
        run.train()


def test_check_has_a_row_for_it(tmp_path):
    student, teacher = tiny.Plain(), tiny.Plain()
    run = tiny.trainer("plain", tmp_path, pair=(student, teacher), kd_run="check")
    student.load_state_dict(teacher.state_dict(), assign=True)
    errors = [row for row in run.check() if row.status == "error"]
    assert len(errors) == 1
    assert "shares 2 parameters with the student" in errors[0].found
