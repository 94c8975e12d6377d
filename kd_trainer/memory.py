"""How much memory a training step takes in each process: bytes, from two configs, without weights and without a device.

For: choosing a backend and a batch size before a run; `kd-trainer memory` prints it for every backend. What a step's
forwards, loss and backward hold is found by `fake_step.py`; weights, gradients, optimizer and buckets are sums here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from .backends import HALVES
from .checks import check_choice, check_number, fail, message, quoted
from .fake_step import FakeStep, without_contents
from .head_choice import PROBLEM_TYPES, auto_class_of, auto_classes
from .heads import HEADS, Head
from .teacher import ADAPTER_OFF

BACKENDS = ("single", "ddp", "fsdp2", "zero2", "zero3")
PRECISIONS = {"no": None, **{name: dtype for dtype, name in HALVES.items()}}


class Memory(NamedTuple):
    """Bytes in one process, each part at its largest; `total` is less than their sum, as gradients come when
    activations go."""

    student: int  # weights
    gradients: int  # with DDP's buckets of them
    optimizer: int  # states, and DeepSpeed's own copy of the weights
    teacher: int  # weights
    teacher_forward: int  # what the teacher's forward takes and frees again
    activations: int  # of the student, kept for backward
    loss: int  # both models' logits and what is made of them, or the fused loss's tiles and gradients
    backend: int  # weights gathered while they are used; DeepSpeed's buckets
    total: int  # the peak of a training step


def estimate_memory(
    student: Any,
    teacher: Any,
    *,
    backend: str = "single",
    processes: int = 1,
    batch_size: int = 8,
    sequence_length: int = 512,
    batch: Mapping[str, Tensor] | None = None,
    mixed_precision: str = "no",
    student_dtype: torch.dtype | str | None = None,
    teacher_dtype: torch.dtype | str | None = None,
    teacher_bits: int | None = None,
    optimizer_bytes: float | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    kd_task: str | None = None,
    kd_loss_implementation: str = "auto",
    reduce_bucket_size: int = 500_000_000,
    stage3_max_reuse_distance: int = 1_000_000_000,
    device: str = "cuda",
) -> Memory:
    """The memory of one process in a step of `DistillationTrainer`, from its second step on.

    Counted: weights, gradients, optimizer, activations, both forwards, the loss, and what a backend gathers and
    buckets. Not counted: the CUDA context (about half a GiB), workspaces of libraries, fragments of the allocator,
    ZeRO-3's prefetch, batches that wait, evaluation. Rows are taken to be full: a mask of padding comes on top. With
    "cuda" the fused loss is taken to run in its Triton kernel or compiled. Checked against runs on CPU, to within 15%
    (configs/README.md); no run on several GPUs has checked it.

    Args:
        student: a config, the folder, file or hub name of one, or a model (on the meta device it takes no memory).
            Parameters that require no gradient, such as a LoRA student's base, have no gradients and states.
        teacher: the same, or "adapter_off".
        backend: one of `BACKENDS`, as configs/accelerate sets it up; processes: how many in all.
        batch_size: rows that a process reads at once; sequence_length: tokens of a row.
        batch: instead of these two, a batch of the collator, e.g. on the meta device: for models that read neither
            tokens nor images, and for columns of the teacher's own.
        mixed_precision: "no", "bf16" or "fp16", as Accelerate's.
        student_dtype, teacher_dtype: of the weights as loaded; None: as the config says, or as the model is.
        teacher_bits: 8 or 4 where bitsandbytes quantises the teacher's linear layers, which no backend then shards.
        optimizer_bytes: of states for each trained parameter; None: AdamW's two numbers of its dtype. SGD has 0, AdamW
            in 8 bits has 2.
        gradient_checkpointing, gradient_accumulation_steps, kd_loss_implementation, kd_task: as in the training
            arguments. kd_task is needed where a config names no architecture.
        reduce_bucket_size, stage3_max_reuse_distance: DeepSpeed's, in elements.
        device: "cuda", or "cpu" for the sizes that the fused loss takes there.

    Raises:
        ValueError: a value out of its range, a config that does not say of what model it is, a model whose forward
            depends on what its tensors hold, a name whose config cannot be loaded.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
        >>> student, teacher = (LlamaConfig(num_hidden_layers=n, **sizes) for n in (2, 8))
        >>> memory = estimate_memory(student, teacher, kd_task="causal_lm", batch_size=2, sequence_length=128)
        >>> memory.student, memory.optimizer
        (152049664, 304099328)
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("mixed_precision", mixed_precision, PRECISIONS)
    check_choice("kd_loss_implementation", kd_loss_implementation, ("auto", "fused", "full"))
    check_choice("device", device, ("cuda", "cpu"))
    for name, value in (("processes", processes), ("batch_size", batch_size), ("sequence_length", sequence_length)):
        check_number(name, value, low=1)
    if kd_task is not None:
        check_choice("kd_task", kd_task, HEADS)
    if teacher_bits not in (None, 8, 4):
        fail("teacher_bits", repr(teacher_bits), "8, 4 or None", "Leave it out for a teacher that is not quantised.")
    if backend == "single" and processes != 1:
        fail("processes", repr(processes), "1 with the backend 'single'", "Name another backend, such as 'ddp'.")
    ours = _model("student", student, kd_task)
    theirs = ours if isinstance(teacher, str) and teacher == ADAPTER_OFF else _model("teacher", teacher, kd_task)
    dtypes = _dtypes(backend, PRECISIONS[mixed_precision], ours, theirs, student_dtype, teacher_dtype)
    deepspeed = backend in ("zero2", "zero3")
    weight_share = 1 / processes if backend in ("fsdp2", "zero3") else 1.0
    teacher_share = 1.0 if teacher_bits else weight_share  # the trainer leaves a quantised teacher where it is
    state_share = 1 / processes if backend in ("fsdp2", "zero2", "zero3") else 1.0

    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in ours.parameters()) - trained
    student_bytes = (trained * dtypes.trained.itemsize + frozen * dtypes.frozen.itemsize) * weight_share
    teacher_bytes = 0.0 if theirs is ours else _teacher_bytes(theirs, dtypes.teacher, teacher_bits) * teacher_share
    gradients = trained * dtypes.trained.itemsize * state_share
    copies = trained * 4 * state_share if deepspeed else 0.0  # it steps on weights and gradients of its own, in float32
    states = 2 * (4 if deepspeed else dtypes.trained.itemsize) if optimizer_bytes is None else optimizer_bytes
    optimizer = trained * states * state_share + copies
    # Gradients that lie there through both forwards: accumulated ones, and the memory that ZeRO-3 keeps for them.
    early = gradients if gradient_accumulation_steps > 1 or backend == "zero3" else 0.0
    mirrored = gradients if backend == "ddp" else 0.0
    # ZeRO-2 has two buckets, with overlap_comm, during backward; ZeRO-3 one from the start.
    buckets = {"zero2": 2, "zero3": 1}.get(backend, 0) * reduce_bucket_size * dtypes.trained.itemsize

    step = FakeStep(
        autocast=None if deepspeed else PRECISIONS[mixed_precision],
        gradient_bytes=0.0 if early else dtypes.trained.itemsize * state_share,
        bucket_bytes=buckets if backend == "zero2" else 0,
        on_cpu=device == "cpu",
    )
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks on modules whose inputs need no gradient
        student_model = without_contents(ours, dtypes.student_used).train()
        teacher_model = student_model
        if theirs is not ours:
            teacher_model = without_contents(theirs, dtypes.teacher_used).eval().requires_grad_(False)
        if gradient_checkpointing:
            student_model.gradient_checkpointing_enable()  # type: ignore[operator]
        if weight_share < 1:
            step.shard(student_model, backend, stage3_max_reuse_distance)
        if teacher_share < 1 and theirs is not ours:
            step.shard(teacher_model, backend, None)
        head = _head(student_model, kd_task)
        columns = _columns(student_model, head, batch_size, sequence_length) if batch is None else batch
        step.run(student_model, teacher_model, head, columns, kd_loss_implementation)
    fixed = student_bytes + teacher_bytes + optimizer + early + mirrored + buckets - step.bucket_bytes
    # After backward: the gradients, and what they are stepped with.
    last = gradients - early + copies + step.tiles * step.on_cpu
    return Memory(
        student=round(student_bytes),
        gradients=round(gradients + mirrored),
        optimizer=round(optimizer),
        teacher=round(teacher_bytes),
        teacher_forward=step.teacher_forward,
        activations=step.activations,
        loss=step.loss,
        backend=buckets + step.gathered,
        total=round(fixed + max(step.peak, last)),
    )


# The table's columns, and the parts in them.
COLUMNS = {
    "student": "student",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "teacher": "teacher",
    "activations": "activations",
    "loss": "loss",
    "gathered, buckets": "backend",
    "peak": "total",
}


def memory_table(student: Any, teacher: Any, *, processes: int = 8, **settings: Any) -> str:
    """A Markdown table of `estimate_memory` with these settings: a row for each backend, GiB in each process."""
    titles = ["GiB in each process", "processes", *COLUMNS]
    rows = [titles, ["---"] * len(titles)]
    for backend in BACKENDS:
        count = 1 if backend == "single" else processes
        memory = estimate_memory(student, teacher, backend=backend, processes=count, **settings)
        sizes = (getattr(memory, part) / 2**30 for part in COLUMNS.values())
        rows.append([f"`{backend}`", str(count), *(f"{x:.{2 if x < 1 else x < 10:d}f}" for x in sizes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---- models ---------------------------------------------------------------------------------------------------------


def _model(argument: str, given: Any, kd_task: str | None) -> nn.Module:
    """The model itself, or one on the meta device from a config or from the name of one."""
    if isinstance(given, nn.Module):
        return given
    import transformers

    config = given
    if isinstance(given, (str, Path)):
        try:
            config = transformers.AutoConfig.from_pretrained(given)
        except (OSError, ValueError) as error:
            expected = f"a folder, a file or a hub name whose config can be loaded ({str(error).splitlines()[0]})"
            text = message(argument, repr(str(given)), expected, "Check it for a typing error.")
            raise ValueError(text) from error
    task = "classification" if kd_task in PROBLEM_TYPES.values() else kd_task
    named = (getattr(config, "architectures", None) or [None])[0]
    for head in HEADS.values():
        for auto_class in auto_classes(head):
            known = auto_class._model_mapping.get(type(config), ())
            for model_class in known if isinstance(known, (tuple, list)) else (known,):
                if head.name == task or (task is None and model_class.__name__ == named):
                    with torch.device("meta"):
                        model = model_class(config)
                    return model.to(config.dtype) if isinstance(config.dtype, torch.dtype) else model
    shown = f"a {type(config).__name__} with the architecture {named}"
    if task is not None:
        fail(argument, shown, f"a config of a model for the task {task!r}", "Give such a config, or another kd_task.")
    tasks = ", ".join(HEADS)
    fail(argument, shown, "a config that names the architecture of one of the tasks", f"Name it, kd_task: {tasks}.")


def _head(model: nn.Module, kd_task: str | None) -> Head:
    known = auto_class_of(model)
    if known is None and kd_task is None:
        shown = f"a {type(model).__name__}, which no Auto class knows"
        fail("student", shown, "a model whose task is known", f"Name it, kd_task: {', '.join(HEADS)}.")
    return known[0] if known is not None else HEADS[str(kd_task)]


class _Dtypes(NamedTuple):
    """What the weights of the models are in."""

    trained: torch.dtype  # the student's that are trained, between the steps; their gradients too
    frozen: torch.dtype
    teacher: torch.dtype
    student_used: torch.dtype  # in the forwards
    teacher_used: torch.dtype


def _dtypes(
    backend: str,
    half: torch.dtype | None,
    ours: nn.Module,
    theirs: nn.Module,
    student_dtype: torch.dtype | str | None,
    teacher_dtype: torch.dtype | str | None,
) -> _Dtypes:
    own, taught = _dtype("student_dtype", student_dtype), _dtype("teacher_dtype", teacher_dtype)
    trained = own or next((p.dtype for p in ours.parameters() if p.requires_grad), torch.float32)
    frozen, taught = own or next(ours.parameters()).dtype, taught or next(theirs.parameters()).dtype
    if backend == "fsdp2" and half:  # Accelerate trains in float32, and gathers in half
        return _Dtypes(torch.float32, frozen, taught, half, half)
    if backend in ("zero2", "zero3"):  # casts what it is given; under ZeRO-2 the trainer casts the teacher
        own = half or torch.float32
        taught = half or (torch.float32 if backend == "zero3" and taught not in HALVES else taught)
        return _Dtypes(own, own, taught, own, taught)
    return _Dtypes(trained, frozen, taught, frozen, taught)


def _dtype(argument: str, given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not isinstance(dtype, torch.dtype):
        fail(argument, quoted(given), "a dtype of torch or its name", "Write it as 'bfloat16' or 'float32'.")
    return dtype


def _teacher_bytes(model: nn.Module, dtype: torch.dtype, bits: int | None) -> float:
    """Of the weights; bitsandbytes leaves embeddings, norms and the output head as they are."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head] if bits else []
    quantised = sum(weight.numel() for weight in linear)
    return (sum(p.numel() for p in model.parameters()) - quantised) * dtype.itemsize + quantised * (bits or 0) / 8


def _columns(model: Any, head: Head, rows: int, length: int) -> dict[str, Tensor]:
    """A batch of tokens or of images, as the model reads them."""
    name, config = getattr(model, "main_input_name", None), model.config
    if name == "input_ids":
        names = ("input_ids", "decoder_input_ids") if head.name == "seq2seq_lm" else ("input_ids",)
        return {name: torch.empty(rows, length, dtype=torch.long, device="meta") for name in names}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {name: torch.empty(rows, getattr(config, "num_channels", 3), *sides, device="meta")}
    mend = "Give one of the collator; the meta device will do."
    fail("batch", None, f"a batch, since {type(model).__name__} reads {name}", mend)
