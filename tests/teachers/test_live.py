"""`teachers/live.py`: loading by path, what the teacher is given, and that it stays as it is."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    LlamaForCausalLM,
    default_data_collator,
)

from kd_trainer.teachers.compatibility import _tokenizer_beside
from kd_trainer.teachers.live import LiveTeacher
from kd_trainer.teachers.load import load_teacher
from tests.helpers import tiny

ACCELERATOR = SimpleNamespace(autocast=contextlib.nullcontext, mixed_precision="no")


@pytest.fixture
def pair():
    return tiny.models("classification")


def live(model: nn.Module) -> LiveTeacher:
    teacher = LiveTeacher(model)
    teacher.prepare(torch.device("cpu"))
    return teacher


# ---- loading ----


@pytest.mark.parametrize("task", ["classification", "token_classification", "causal_lm"])
def test_a_path_is_loaded_with_the_class_of_the_students_task(task, tmp_path):
    student, teacher = tiny.models(task)
    teacher.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path)):
        loaded = load_teacher(path, student, {})
        assert type(loaded) is type(teacher)
        assert torch.equal(tiny.weights(loaded), tiny.weights(teacher))


@pytest.mark.parametrize(
    "build",
    [
        lambda: LlamaForCausalLM(tiny.llama_config(tie_word_embeddings=True)),
        lambda: BertForMaskedLM(tiny.bert_config()),
    ],
)
def test_tied_weights_are_not_missing(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path, model, {})
    assert torch.equal(tiny.weights(loaded), tiny.weights(model))


def test_the_path_works_through_the_trainer(pair, tmp_path):
    from kd_trainer import DistillationTrainer

    student, teacher = pair
    teacher.save_pretrained(tmp_path / "teacher")
    data = {"data_collator": tiny.pad, "train_dataset": tiny.rows("classification")}
    kwargs = {
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "teacher_model_init_kwargs": {"dtype": "bfloat16"},
    }
    run = DistillationTrainer(model=student, args=tiny.arguments(tmp_path, max_steps=1, **kwargs), **data)
    assert {p.dtype for p in run.teacher.model.parameters()} == {torch.bfloat16}
    run.train()
    assert run.summary()["teacher"] == str(tmp_path / "teacher")


def test_a_module_is_kept(pair):
    student, teacher = pair
    assert load_teacher(teacher, student, {}) is teacher
    with pytest.raises(
        ValueError, match=r"`teacher_model_init_kwargs` is {'dtype': 'bfloat16'}; expected nothing where"
    ):
        load_teacher(teacher, student, {"dtype": "bfloat16"})


@pytest.mark.parametrize("wrong", [3, object(), ["a"]])
def test_neither_module_nor_path(wrong, pair):
    with pytest.raises(
        TypeError, match=rf"`teacher_model` is of type {type(wrong).__name__}; expected a torch module, a fol"
    ):
        load_teacher(wrong, pair[0], {})


@pytest.mark.parametrize("build", [BertModel, BertForTokenClassification])
def test_a_newly_initialised_head_is_refused(build, pair, tmp_path):
    build(tiny.bert_config()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"already fine-tuned for the student's task, because .*(classifier|pooler)"
    ) as caught:
        load_teacher(tmp_path, pair[0], {})
    assert "Fine-tune the teacher first" in str(caught.value)


def test_a_head_of_another_size_is_refused(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="newly initialised and teach noise: classifier"):
        load_teacher(tmp_path, pair[0], {"num_labels": 3, "ignore_mismatched_sizes": True})


def test_a_path_that_does_not_exist(pair, tmp_path):
    with pytest.raises(
        ValueError, match=r"`teacher_model` is '.*/typo'; expected a folder.*Check the path for a typing error"
    ):
        load_teacher(tmp_path / "typo", pair[0], {})


def test_an_empty_folder_and_a_broken_file(pair, tmp_path):
    with pytest.raises(ValueError, match=r"`teacher_model` is .*Check the path for a typing error\.$"):
        load_teacher(tmp_path, pair[0], {})
    pair[1].save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"`teacher_model` is .*Check the path for a typing error\.$"):
        load_teacher(tmp_path, pair[0], {})


def test_arguments_that_upstream_does_not_take(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"`teacher_model_init_kwargs` is {'dtyp': 'x'}; expected .*Check their names and"
    ):
        load_teacher(tmp_path, pair[0], {"dtyp": "x"})


def test_a_path_for_a_student_of_the_users_own(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no Auto class of transformers has a student of type Plain\. Load the teacher your"
    ):
        load_teacher(tmp_path, tiny.Plain(), {})


def test_pickles_are_refused_unless_asked_for(pair, tmp_path):
    student, teacher = pair
    teacher.config.save_pretrained(tmp_path)
    torch.save(teacher.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected a folder with .*safetensors.*a pickle.*\"use_safetensors\": false"):
        load_teacher(tmp_path, student, {})
    loaded = load_teacher(tmp_path, student, {"use_safetensors": False})
    assert torch.equal(tiny.weights(loaded), tiny.weights(teacher))


def test_safetensors_are_preferred_to_a_pickle_beside_them(pair, tmp_path):
    student, teacher = pair
    teacher.save_pretrained(tmp_path)
    torch.save({k: torch.zeros_like(v) for k, v in teacher.state_dict().items()}, tmp_path / "pytorch_model.bin")
    assert torch.equal(tiny.weights(load_teacher(tmp_path, student, {})), tiny.weights(teacher))


# ---- what it is given, what it gives ----


def test_code_of_the_checkpoint_runs_only_when_asked_for(pair, tmp_path):
    """A config and a tokenizer that name code of their own: a model type that transformers does not know."""
    pair[1].save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import BertConfig, BertForSequenceClassification\n"
        "class Config(BertConfig):\n    model_type = 'own'\n"
        "class Model(BertForSequenceClassification):\n    config_class = Config\n"
    )
    auto_map = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model",
                "AutoTokenizer": ["own.Tokenizer", None]}  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    with pytest.raises(ValueError, match=r"code of its own: .*\{\"trust_remote_code\": true\}"):
        load_teacher(str(tmp_path), pair[0], {})
    assert not ran.exists()
    teacher = load_teacher(str(tmp_path), pair[0], {"trust_remote_code": True})
    assert ran.exists()
    ran.unlink()
    _tokenizer_beside(teacher, {})
    assert not ran.exists()


def test_no_gradients_and_no_training_mode(pair):
    model = pair[1].train()
    teacher = live(model)
    batch = tiny.pad(tiny.rows("classification")[:4])
    logits = teacher(batch, ACCELERATOR)
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    model.classifier.train()
    assert torch.equal(teacher(batch, ACCELERATOR), logits)
    assert not model.classifier.training


class Spy(nn.Module):
    """Says what it was called with; its logits are 0, 1, 2 ... in every row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict = {}

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, use_cache=None):
        self.seen = {k: v for k, v in locals().items() if k not in ("self", "__class__") and v is not None}
        return torch.arange(5.0).repeat(len(input_ids), 1)


def test_the_teacher_reads_the_students_columns_or_its_own():
    spy = Spy()
    teacher = live(spy)
    ids, mask, types, own, own_mask = (torch.full((2, 3), i) for i in range(5))
    student = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": torch.zeros(2), "other": 1}
    teacher(student, ACCELERATOR)
    assert set(spy.seen) == {"input_ids", "attention_mask", "token_type_ids", "use_cache"}
    assert spy.seen["input_ids"] is ids
    assert spy.seen["use_cache"] is False
    teacher({**student, "teacher_input_ids": own, "teacher_attention_mask": own_mask, "teacher_other": 1}, ACCELERATOR)
    assert spy.seen["input_ids"] is own
    assert spy.seen["attention_mask"] is own_mask
    assert "token_type_ids" not in spy.seen  # those of the student's tokens
    teacher({**student, "teacher_token_type_ids": own}, ACCELERATOR)
    assert spy.seen["input_ids"] is ids
    assert spy.seen["token_type_ids"] is own


def test_ids_beyond_a_smaller_embedding_never_reach_the_teacher():
    """On an accelerator they would stop the process without a name."""
    spy = Spy()
    teacher = live(spy)
    teacher.id_limit = 3
    teacher({"input_ids": torch.tensor([[0, 2]])}, ACCELERATOR)
    seen = spy.seen
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"`input_ids` is {wrong} in a batch; expected 0 to 2, the rows of the t"):
            teacher({"input_ids": torch.tensor([[0, wrong]])}, ACCELERATOR)
    assert spy.seen is seen


def test_another_index_error_of_the_teacher_is_the_cause_of_one_that_names_it():
    class Broken(Spy):
        def forward(self, input_ids):
            raise IndexError("something else")

    with pytest.raises(ValueError, match=r"`teacher_model` is a Broken.*\(IndexError: something else\)") as caught:
        live(Broken())({"input_ids": torch.tensor([[0, 2]])}, ACCELERATOR)
    assert type(caught.value.__cause__) is IndexError


def test_the_batch_is_not_changed():
    teacher = live(Spy())
    batch = {"input_ids": torch.ones(2, 3), "teacher_input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 3)}
    before = dict(batch)
    teacher(batch, ACCELERATOR)
    assert list(batch) == list(before)
    assert all(batch[k] is before[k] for k in before)


def test_own_tokens_without_an_own_mask_are_refused(tmp_path):
    run = tiny.trainer("classification", tmp_path)
    batch = tiny.pad(tiny.rows("classification")[:4])
    with pytest.raises(
        ValueError, match=r"`teacher_attention_mask` is None; expected a column beside teacher_input_ids"
    ):
        run.compute_loss(run.model, {**batch, "teacher_input_ids": batch["input_ids"]})


def test_own_columns_reach_the_teacher_alone_from_every_kind_of_dataset(tmp_path):
    import datasets

    rows = [{"input_ids": [1, 2], "attention_mask": [1, 1], "teacher_input_ids": [3, 4, 5],
             "teacher_attention_mask": [1] * 3, "labels": i % 5, "text": "unused"} for i in range(16)]  # fmt: skip
    whole = datasets.Dataset.from_list(rows)
    for data in (whole, whole.to_iterable_dataset()):
        student, teacher = tiny.models("classification")
        seen = {}
        student.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.update(student=k), with_kwargs=True)
        teacher.register_forward_pre_hook(lambda m, a, k, seen=seen: seen.update(teacher=k), with_kwargs=True)
        run = tiny.trainer("classification", tmp_path, pair=(student, teacher), data=data, remove_unused_columns=True)
        run.train()
        assert seen["student"]["input_ids"].tolist()[0] == [1, 2]
        assert seen["teacher"]["input_ids"].tolist()[0] == [3, 4, 5]
        assert seen["teacher"]["attention_mask"].shape[1] == 3


@pytest.mark.parametrize("streamed", [False, True])
def test_own_columns_of_a_teacher_that_takes_anything(streamed, tmp_path):
    """Its forward names no column that could be kept by name."""
    import datasets

    class Anything(nn.Module):
        def forward(self, **columns):
            return {"logits": columns["scores"]}

    scores = [float(i) for i in range(tiny.CLASSES)]
    rows = [{"features": [0.0] * 6, "teacher_scores": scores, "labels": 0, "unused": 1} for _ in range(8)]
    data = datasets.Dataset.from_list(rows)
    data = data.to_iterable_dataset() if streamed else data
    pair = tiny.Plain(), Anything()
    run = tiny.trainer("plain", tmp_path, pair=pair, data=data, remove_unused_columns=True, max_steps=1)
    run.data_collator = default_data_collator
    run.train()
    assert tiny.logged(run, "soft_loss")


def test_class_order_reorders_the_last_dimension():
    teacher = live(Spy())
    teacher.class_order = torch.tensor([4, 0, 1, 2, 3])
    assert teacher({"input_ids": torch.ones(2, 3)}, ACCELERATOR).tolist() == [[4, 0, 1, 2, 3]] * 2


def test_a_teacher_placed_by_its_loader_stays_there():
    spy = Spy()
    spy.hf_device_map = {"": "cpu"}
    spy.to = lambda *a: pytest.fail("moved")  # type: ignore[method-assign]
    teacher = LiveTeacher(spy)
    teacher.prepare(torch.device("cpu"))
    assert not spy.weight.requires_grad
    quantised = Spy()
    quantised.quantization_method = "bitsandbytes"
    quantised.to = lambda *a: pytest.fail("moved")  # type: ignore[method-assign]
    LiveTeacher(quantised).prepare(torch.device("cpu"))


def no_room_on_a_gpu(x):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_room_here(x):
    return torch.empty(2**60)


@pytest.mark.parametrize("allocate", [no_room_on_a_gpu, no_room_here])
def test_a_teacher_that_runs_out_of_memory_is_named(allocate, tmp_path):
    student, teacher = tiny.models("plain")
    teacher.forward = lambda features: allocate(features)
    run = tiny.trainer("plain", tmp_path, pair=(student, teacher))
    before = tiny.weights(student)
    with pytest.raises(
        RuntimeError, match=r"`teacher_model` is out of memory in its forward on a batch of \[8, 6\]"
    ) as e:
        run.train()
    assert "Lower the batch size" in str(e.value)
    assert should_reduce_batch_size(e.value), "auto_find_batch_size goes by upstream's words"
    assert torch.equal(tiny.weights(student), before)


def test_other_errors_of_the_teacher_name_it(tmp_path):
    student, teacher = tiny.models("plain")
    teacher.linear = nn.Linear(7, tiny.CLASSES)
    with pytest.raises(RuntimeError, match=r"^`teacher_model` is a Plain, .*\(RuntimeError: mat1 and mat2"):
        tiny.trainer("plain", tmp_path, pair=(student, teacher)).train()
