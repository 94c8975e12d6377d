"""The memory estimate: by hand, against the resident bytes of real runs and published sizes, and by its own laws."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, T5Config, ViTConfig

from kd_trainer import MLPConfig, estimate_memory
from kd_trainer.cli import main
from kd_trainer.diagnostics.memory import BACKENDS, memory_table
from tests.helpers import launch, memory_run, tiny

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs" / "models"
ALLOWED = 0.2  # of the peak, as in configs/README.md; activations are approximate and compared by hand below
PART = 0.08


# ---- against runs ---------------------------------------------------------------------------------------------------

LINUX = Path("/proc/self/clear_refs").exists()
# `memory_run.MEASURED` are settings of glibc: with them a tensor's bytes are resident exactly while it lives.
linux = pytest.mark.skipif(not LINUX or platform.libc_ver()[0] != "glibc", reason="neither /proc nor glibc is here")
TWO = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPModule", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}


def estimated(name: str, backend: str = "single"):
    case = memory_run.CASES[name]
    settings = dict(case.arguments)
    precision = "bf16" if settings.pop("bf16", False) else "no"
    with torch.device("meta"):
        student, teacher = memory_run.models(case, memory_run.configs(case))
    return estimate_memory(
        student, teacher, backend=backend, processes=1 if backend == "single" else 2, batch_size=case.rows,
        sequence_length=case.length, mixed_precision=precision, reduce_bucket_size=memory_run.BUCKET, device="cpu",
        **settings,
    )  # fmt: skip


def near(estimate: float, measured: float, allowed: float) -> bool:
    return abs(estimate / measured - 1) <= allowed


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    def make(out: Path) -> None:
        command = [sys.executable, memory_run.__file__, str(out), "single", *memory_run.CASES]
        environment = {**os.environ, **memory_run.MEASURED}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]

    return launch.once(tmp_path_factory, "memory_single", make)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    def make(backends: str, out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in memory_run.MEASURED.items():
                patch.setenv(name, value)
            launch.two_processes("memory_run.py", str(out), backends, "fused", fresh=True)

    def get(backend: str) -> Path:
        backends = "zero2,zero3" if backend.startswith("zero") else "ddp,fsdp2"
        return launch.once(tmp_path_factory, f"memory_{backends}", functools.partial(make, backends))

    return get


@linux
@pytest.mark.launch
@pytest.mark.parametrize("name", memory_run.CASES)
def test_one_process_takes_what_is_estimated(name, single):
    measured = json.loads((single / f"single_{name}_0.json").read_text())
    memory = estimated(name)
    assert near(memory.total, measured["total"], ALLOWED), (memory, measured)
    assert near(memory.student + memory.teacher, measured["weights"], PART)
    if name != "adapters":  # whose gradients and states are too small to be seen
        assert near(memory.optimizer, measured["optimizer"], PART)
    if name in ("full", "checkpointed", "classification", "bf16"):  # else they lie where something else was
        assert near(memory.gradients, measured["gradients"], PART)
    if name == "full":
        rest = memory.student + memory.teacher + memory.optimizer + memory.activations
        assert near(memory.loss, measured["total"] - rest, PART)


@linux
@pytest.mark.launch
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(
            name.startswith("zero") and importlib.util.find_spec("deepspeed") is None,
            reason="deepspeed is not installed",
        ))
        for name in TWO
    ],
)  # fmt: skip
def test_each_of_two_processes_takes_what_is_estimated(backend, two):
    memory = estimated("fused", backend)
    for process in range(2):
        measured = json.loads((two(backend) / f"{backend}_fused_{process}.json").read_text())
        assert measured["world_size"] == 2
        assert TWO[backend] in measured["wrapper"]
        assert near(memory.total, measured["total"], ALLOWED), (memory, measured)
        placed = memory.student + memory.teacher
        if backend.startswith("zero"):  # places its copy of the weights at once, a third of what it will hold
            placed += memory.optimizer // 3 + (memory.gradients if backend == "zero3" else 0)
        else:
            assert near(memory.optimizer, measured["optimizer"], PART)
        assert near(placed, measured["weights"], PART)


# ---- by hand --------------------------------------------------------------------------------------------------------

# Two layers of width 8, MLP 32, 2 heads, 100 ids: a BERT with 4 labels, and a Llama with k and v of one head and 16 in
# its MLP. Rows: 3 of 10 tokens; the teacher has 4 layers.
BERT = {"vocab_size": 100, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 4,
        "max_position_embeddings": 20, "type_vocab_size": 2}  # fmt: skip
LLAMA = {"vocab_size": 100, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 16, "tie_word_embeddings": True}  # fmt: skip
BERT_LAYER = 4 * (8 * 8 + 8) + 2 * 16 + (8 * 32 + 32) + (32 * 8 + 8)  # attention, two norms, MLP
BERT_REST = (100 + 20 + 2) * 8 + 16 + (8 * 8 + 8) + (8 * 4 + 4)  # embeddings, norm, pooler, classifier
LLAMA_LAYER = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16 + 2 * 8
LLAMA_REST = 100 * 8 + 8
WEIGHTS = {"bert": (BERT_REST + 2 * BERT_LAYER, BERT_REST + 4 * BERT_LAYER),
           "llama": (LLAMA_REST + 2 * LLAMA_LAYER, LLAMA_REST + 4 * LLAMA_LAYER)}  # fmt: skip


def by_hand(kind: str, **settings):
    if kind == "bert":
        pair, task = [BertConfig(num_hidden_layers=n, **BERT) for n in (2, 4)], "classification"
    else:
        pair, task = [LlamaConfig(num_hidden_layers=n, **LLAMA) for n in (2, 4)], "causal_lm"
    settings = {"kd_task": task, "batch_size": 3, "sequence_length": 10, "reduce_bucket_size": 7, **settings}
    return estimate_memory(*pair, **settings)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("optimizer_bytes", [None, 0, 2], ids=["adamw", "sgd", "adamw_8bit"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_gradients_and_states_by_hand(backend, kind, optimizer_bytes):
    student, teacher = WEIGHTS[kind]
    processes = 1 if backend == "single" else 2
    memory = by_hand(kind, backend=backend, processes=processes, optimizer_bytes=optimizer_bytes)
    whole, gradient_share = {
        "single": (1, 1), "ddp": (1, 2), "fsdp2": (1 / 2, 1 / 2), "zero2": (1, 1 / 2), "zero3": (1 / 2, 1 / 2),
    }[backend]  # fmt: skip
    sharded_states = 1 / 2 if backend in ("fsdp2", "zero2", "zero3") else 1
    states = 8 if optimizer_bytes is None else optimizer_bytes
    states += 4 if backend.startswith("zero") else 0  # DeepSpeed's own weights
    assert memory.student == 4 * student * whole
    assert memory.teacher == 4 * teacher * whole
    assert memory.gradients == 4 * student * gradient_share
    assert memory.optimizer == states * student * sharded_states
    # What is gathered: a tied head, a layer beside it or the teacher's embedding; ZeRO-3 keeps all of so small a model.
    embedding, layer = (800, LLAMA_LAYER) if kind == "llama" else (800, BERT_LAYER)
    gathered = {"fsdp2": (embedding if kind == "llama" else 0), "zero3": student}.get(backend)
    buckets = {"zero2": 2 * 7, "zero3": 7}.get(backend, 0)
    largest = 0 if gathered is None else max(embedding, layer)
    assert memory.backend == 4 * (buckets + (gathered or 0) + largest)
    moving = max(memory.activations + memory.loss, memory.teacher_forward)
    kept = memory.student + memory.teacher + memory.optimizer + memory.backend
    if backend == "single":
        assert memory.total == kept + max(moving, memory.gradients)
    elif backend == "ddp":
        assert memory.total == kept + memory.gradients // 2 + max(moving, memory.gradients // 2)


def test_activations_are_the_published_formula():
    tokens, hidden, heads, length = 30, 8, 2, 10
    half = {"student_dtype": "bfloat16", "teacher_dtype": "bfloat16"}
    assert by_hand("bert", **half).activations == 2 * tokens * 34 * hidden
    eager = BertConfig(num_hidden_layers=2, attn_implementation="eager", **BERT)
    settings = {"kd_task": "classification", "batch_size": 3, "sequence_length": 10, **half}
    memory = estimate_memory(eager, eager, **settings)
    assert memory.activations == 2 * tokens * (34 * hidden + 5 * heads * length)
    assert memory.teacher_forward == memory.activations // 2  # a layer
    # Float32 has dropout masks of a byte all the same.
    assert by_hand("bert").activations == 2 * tokens * (2 * 32 + 2) * hidden
    # Under autocast the stream between the layers is float32, and the weights that are cast are kept.
    cast = 2 * (BERT_LAYER - 2 * 16 - 4 * 8 - 32 - 8) + 8 * 8 + 8 * 4
    assert by_hand("bert", mixed_precision="bf16").activations == 2 * tokens * 38 * hidden + 2 * cast
    # With one head of keys and values for two of queries, and three products of 16 in the MLP.
    position = 2 * (2 + 1 + 1 + 2 / 2 + 1 + 1) * hidden + 2 * 4 * 16 + 2 * hidden
    assert by_hand("llama", **half).activations == 2 * tokens * position
    recomputed = by_hand("llama", **half, gradient_checkpointing=True).activations
    assert recomputed == 2 * tokens * 2 * hidden + tokens * position


def test_an_encoder_decoder_has_two_sides():
    sizes = {"num_layers": 1, "num_decoder_layers": 3, "d_model": 8, "d_ff": 32, "num_heads": 2, "d_kv": 4}
    config = T5Config(vocab_size=100, attn_implementation="eager", **sizes)
    batch = {name: torch.zeros(3, n, dtype=torch.long) for name, n in (("input_ids", 20), ("decoder_input_ids", 5))}
    memory = estimate_memory(config, config, kd_task="seq2seq_lm", batch=batch)
    position, score = (2 * 32 + 2) * 8, 2 * 9
    assert memory.activations == 3 * 20 * (position + 20 * score) + 3 * (3 * 5 * (position + 5 * score))
    assert memory.loss == 15 * 100 * (4 + 4 + 8)  # 100 ids: full logits


def test_the_loss_by_hand():
    # 27 of 30 positions have a next token: logits, copies of the counted, log-softmax and gradient.
    assert by_hand("llama").loss == 100 * ((30 + 27) * 8 + 27 * 8)
    assert by_hand("bert").loss == 3 * 4 * (8 + 8)
    # Fused: tiles of both, gradients of head and hidden states, the teacher's hidden states.
    assert by_hand("llama", kd_loss_implementation="fused").loss == 4 * (2 * 27 * 100 + 100 * 8 + 27 * 16)
    # Cut to a tile's bytes; in half precision the weight's gradient is then summed in float32.
    large = LlamaConfig(num_hidden_layers=1, **{**LLAMA, "vocab_size": 2**20})
    sizes = {"kd_task": "causal_lm", "batch_size": 1, "sequence_length": 1025}
    memory = estimate_memory(large, large, student_dtype="bfloat16", teacher_dtype="bfloat16", **sizes)
    tiles = 2 * 128 * 2**20 * 2  # 256 MiB of logits a side
    assert memory.loss == tiles + 2**20 * 8 * (2 + 6) + 1024 * 16 * 2


def test_models_that_are_no_transformers():
    class Images(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cut, self.classes = torch.nn.Conv2d(3, 8, 4), torch.nn.Linear(8, 10)

    batch = {"features": torch.empty(6, 8)}
    two = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    memory = estimate_memory(two, two, kd_task="classification", batch=batch)
    assert memory.activations == 6 * (5 + 3) * 4
    assert memory.student == 4 * (8 * 5 + 5 + 5 * 3 + 3)
    memory = estimate_memory(Images(), two, kd_task="classification", batch=batch)
    assert memory.activations is None  # and the peak is that of the rest
    assert memory.total == memory.student + memory.optimizer + memory.teacher + max(memory.gradients, memory.loss)
    table = memory_table(Images(), two, kd_task="classification", batch=batch)
    assert table.count(" not known ") == len(BACKENDS)


# ---- laws -----------------------------------------------------------------------------------------------------------


def llama(layers: int = 2, **kwargs) -> LlamaConfig:
    return tiny.llama_config(64, **{"vocab_size": 4096, "num_hidden_layers": layers, **kwargs})


def of_llamas(student=None, teacher=None, **kwargs):
    settings = {"kd_task": "causal_lm", "batch_size": 2, "sequence_length": 32, **kwargs}
    return estimate_memory(student or llama(), teacher or llama(4), **settings)


PUBLISHED = {  # parameters, as the model cards have them
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.mark.parametrize(("student", "teacher"), [("llama-3.2-1b", "llama-3.1-8b"), ("qwen2.5-0.5b", "qwen2.5-7b")])
def test_sizes_are_the_published_ones_and_no_weights_are_made(student, teacher):
    before = memory_run.resident("VmHWM") if LINUX else 0
    configs = (str(MODELS / f"{name}.json") for name in (student, teacher))
    memory = estimate_memory(*configs, batch_size=1, sequence_length=8)
    assert (memory.student, memory.teacher) == (2 * PUBLISHED[student], 2 * PUBLISHED[teacher])  # bfloat16, both
    assert memory.optimizer == 2 * memory.gradients == 2 * memory.student
    if before:
        assert memory_run.resident("VmHWM") - before < 2**29


def test_a_process_has_its_share():
    whole = of_llamas()
    assert of_llamas(backend="ddp", processes=4).gradients == 2 * whole.gradients  # and buckets of them
    for backend in ("fsdp2", "zero3"):
        memory = of_llamas(backend=backend, processes=4, reduce_bucket_size=0)
        assert (memory.student, memory.teacher, memory.gradients) == (
            whole.student // 4, whole.teacher // 4, whole.gradients // 4
        )  # fmt: skip
        assert memory.backend > 0
        assert memory.total < whole.total
    memory = of_llamas(backend="zero2", processes=4, reduce_bucket_size=10)
    assert (memory.student, memory.teacher, memory.gradients) == (whole.student, whole.teacher, whole.gradients // 4)
    assert memory.optimizer == 3 * whole.student // 4  # DeepSpeed's own weights, and two states
    assert memory.backend == 2 * 10 * 4
    large = of_llamas(backend="zero2", processes=4, reduce_bucket_size=10**8)
    assert large.total > memory.total + 2 * 10**8 * 4 - memory.loss  # the buckets come when the loss's memory has gone


def test_mixed_precision_and_dtypes():
    half = {"mixed_precision": "bf16"}
    single = of_llamas(**half)
    assert single.student == of_llamas().student  # float32, cast as it goes
    assert of_llamas(student_dtype="bfloat16", teacher_dtype=torch.float16).total < single.total
    assert of_llamas(llama(dtype="bfloat16")).student == single.student // 2  # as `from_pretrained` loads it
    assert of_llamas(llama(dtype="bfloat16"), student_dtype="float32").student == single.student
    fsdp2 = of_llamas(llama(dtype="bfloat16"), backend="fsdp2", processes=2, **half)
    assert (fsdp2.student, fsdp2.gradients) == (single.student // 2, single.student // 2)  # trained in float32
    for backend, share in (("zero2", 1), ("zero3", 2)):
        zero = of_llamas(backend=backend, processes=2, **half)
        assert (zero.student, zero.teacher) == (single.student // 2 // share, single.teacher // 2 // share)
        assert zero.optimizer == 3 * single.student // 2


def test_what_saves_memory_does():
    base = of_llamas(sequence_length=256)
    assert of_llamas(sequence_length=256, kd_loss_implementation="full").loss > base.loss
    assert of_llamas(optimizer_bytes=0).optimizer == 0
    kept = of_llamas(sequence_length=256, gradient_accumulation_steps=2).total - base.total
    assert 0 < kept <= base.gradients
    quantised = of_llamas(teacher_bits=4, backend="fsdp2", processes=2)
    linear = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    assert quantised.teacher == of_llamas().teacher - linear * 4 + linear // 2  # whole: it is not sharded


def test_adapters_alone_are_trained():
    peft = pytest.importorskip("peft")
    with torch.device("meta"):
        base = LlamaForCausalLM(llama())
    student = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for backend in BACKENDS:
        processes = 1 if backend == "single" else 2
        memory = of_llamas(student, "adapter_off", backend=backend, processes=processes, reduce_bucket_size=0)
        assert memory.teacher == 0
        entries = 2 * 2 * 4 * 64 * 4
        assert memory.gradients == {"single": entries, "ddp": 2 * entries}.get(backend, entries // 2)
    assert all(p.is_meta for p in student.parameters())


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (BertConfig(num_hidden_layers=1, vocab_size=3000), "masked_lm"),
        (BertConfig(num_hidden_layers=1, vocab_size=3000), "token_classification"),
        (BertConfig(num_hidden_layers=1, vocab_size=3000), "question_answering"),
        (BertConfig(num_hidden_layers=1, vocab_size=3000), "multi_label_classification"),
        (T5Config(num_layers=1, vocab_size=3000), "seq2seq_lm"),
        (ViTConfig(num_hidden_layers=1), "classification"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_tasks(config, task):
    memory = estimate_memory(config, config, kd_task=task, batch_size=2, sequence_length=64)
    parts = memory.student + memory.optimizer + memory.teacher
    assert memory.activations > 0
    assert parts + memory.activations <= memory.total <= sum(memory[:-1])
    # Rows of tokens or of images: twice as many, twice the activations, but for what is there once.
    twice = estimate_memory(config, config, kd_task=task, batch_size=4, sequence_length=64)
    assert twice.activations == pytest.approx(2 * memory.activations, rel=0.02)
    assert twice.loss == pytest.approx(2 * memory.loss, rel=0.5, abs=2**16)


def test_a_batch_of_the_users_own():
    batch = {"features": torch.empty(32, 784, device="meta"), "labels": torch.empty(32, dtype=torch.long)}
    student, teacher = MLPConfig(hidden_sizes=[64]), MLPConfig(hidden_sizes=[256, 256, 256])
    memory = estimate_memory(student, teacher, kd_task="classification", batch=batch)
    assert (memory.student, memory.teacher) == (4 * 50_890, 4 * 335_114)
    with pytest.raises(
        ValueError, match=r"`batch` is None; expected a batch, since MLPForImageClassification reads fea"
    ):
        estimate_memory(student, teacher, kd_task="classification")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "zero1"}, "`backend` is 'zero1'; expected one of 'single', 'ddp'"),
        ({"processes": 2}, "`processes` is 2; expected 1 with the backend 'single'"),
        ({"batch_size": 0}, "`batch_size` is 0; expected a finite number >= 1"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` is 'fp8'; expected one of 'no', 'bf16', 'fp16'"),
        ({"student_dtype": "half precision"}, "`student_dtype` is 'half precision'; expected a dtype of torch"),
        ({"teacher_bits": 2}, "`teacher_bits` is 2; expected 8, 4 or None"),
        ({"kd_task": "chess"}, "`kd_task` is 'chess'; expected one of"),
        ({"kd_task": None}, "`student` is a LlamaConfig with the architecture None; expected a config that names"),
        (
            {"kd_task": "masked_lm"},
            "`student` is a LlamaConfig with the architecture None; expected a config of a model",
        ),
        ({"kd_task": "classification", "kd_loss_implementation": "fused"}, "`kd_loss_implementation` is 'fused'"),
    ],
)
def test_what_cannot_be_estimated_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        of_llamas(**settings)


# ---- the command and the page ---------------------------------------------------------------------------------------


def test_the_command_tells_what_is_wrong_in_one_line(capsys):
    assert main(["memory", "nowhere", "nowhere"]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("kd-trainer: `student` is 'nowhere'; expected a folder, a file or a hub name whose config")


PAGE = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^kd-trainer (memory .*?[^\\])\n```\n\n(\|.*?)\n\n", PAGE, re.M | re.S)


def test_the_page_has_a_table_for_each_pair():
    assert len(COMMANDS) == 4


@pytest.mark.launch
@pytest.mark.parametrize(("command", "table"), COMMANDS, ids=lambda text: re.sub(r"\W+", "_", text[:60]))
def test_the_tables_of_the_page_are_what_the_command_prints(command, table, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(command.replace("\\\n", " ").split()) == 0
    assert capsys.readouterr().out.strip() == table
