"""Memory of a training step in each process: bytes computed from two configs, without a device.

For: choosing a backend and a batch size before a run; `kd-trainer memory` prints it for every backend. Weights,
gradients, optimizer and buckets are sums. Activations are APPROXIMATE: the formula of Korthikanti et al. 2022,
arXiv:2205.05198, and the peak with them; `trainer.check()` measures a step.
Letters: L positions of a row, H hidden size, I inner size of the MLP, A attention heads, V vocabulary, N positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..losses import chunk_rows, group_rows
from ..tasks import PROBLEM_TYPES, TASKS, Task, auto_class_of, auto_classes, main_input, plain_heads, vocabulary_rows
from ..teachers import ADAPTER_OFF, HALVES, layer_classes
from ..validation import check_choice, check_number, fail, message, quoted

BACKENDS = ("single", "ddp", "fsdp2", "zero2", "zero3")
PRECISIONS = {"no": None, **{name: dtype for dtype, name in HALVES.items()}}
_DEEPSPEED = ("zero2", "zero3")  # casts the weights; elsewhere the forward casts
_GATES = ("gate_proj", "gate_up_proj", "wi_0")
_INNER = ("intermediate_size", "d_ff", "encoder_ffn_dim", "ffn_dim", "hidden_dim", "n_inner")  # I in transformers


class Memory(NamedTuple):
    """Bytes in one process, each part at its maximum; `total` is less than their sum: gradients replace activations."""

    student: int  # weights
    gradients: int  # with DDP's buckets of them
    optimizer: int  # states, and DeepSpeed's own copy of the weights
    teacher: int  # weights
    teacher_forward: int  # approximate: one layer of the teacher, without gradient
    activations: int | None  # approximate, of the student, kept for backward; None: not known, and not in `total`
    loss: int  # both models' logits and what is made of them, or the fused loss's tiles and gradients
    backend: int  # weights gathered while they are used; DeepSpeed's buckets
    total: int  # approximate: the peak of a training step


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

    Activations are the published formula where the config has hidden size, layers and heads and the rows are tokens or
    patches; the outputs of the linear layers in a model without them, such as an MLP; not known with convolutions.
    Not counted: the CUDA context (about half a GiB), workspaces, fragmentation, prefetch, queued batches, evaluation.

    Args:
        student: a config, the folder, file or hub name of one, or a model (on the meta device it takes no memory).
            Parameters that require no gradient, such as a LoRA student's base, have no gradients and states.
        teacher: the same, or "adapter_off".
        backend: one of `BACKENDS`, as configs/accelerate sets it up; processes: how many in all.
        batch_size: rows that a process reads at once; sequence_length: tokens of a row.
        batch: instead of these two, for models that read neither tokens nor images; the meta device will do.
        mixed_precision: "no", "bf16" or "fp16", as Accelerate's.
        student_dtype, teacher_dtype: of the weights as loaded; None: as in the config, or as the model is.
        teacher_bits: 8 or 4 where bitsandbytes quantises the teacher's linear layers, which no backend then shards.
        optimizer_bytes: of states for each trained parameter; None: AdamW's two numbers of its dtype (SGD: 0).
        gradient_checkpointing, gradient_accumulation_steps, kd_loss_implementation, kd_task: as in the training
            arguments. kd_task is needed where a config names no architecture.
        reduce_bucket_size, stage3_max_reuse_distance: DeepSpeed's, in elements.
        device: "cuda", or "cpu" for the sizes that the fused loss takes there.

    Raises:
        ValueError: a value out of its range, a config that does not name its model or cannot be loaded,
            "fused" with models that have full logits.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
        >>> student, teacher = (LlamaConfig(num_hidden_layers=n, **sizes) for n in (2, 8))
        >>> memory = estimate_memory(student, teacher, kd_task="causal_lm", batch_size=2, sequence_length=128)
        >>> memory.student, memory.optimizer
        (152053760, 304107520)

    Source: Korthikanti et al. 2022, arXiv:2205.05198.
    """
    _check_settings(
        backend, mixed_precision, kd_loss_implementation, device, kd_task, teacher_bits, processes=processes,
        batch_size=batch_size, sequence_length=sequence_length,
    )  # fmt: skip
    model = _model("student", student, kd_task)
    off = isinstance(teacher, str) and teacher == ADAPTER_OFF
    teacher_model = model if off else _model("teacher", teacher, kd_task)
    task = _task(model, kd_task)
    columns = _columns(model, task, batch_size, sequence_length) if batch is None else batch
    heads = [plain_heads(side, None, task.over_tokens, kd_loss_implementation)[0] for side in (model, teacher_model)]
    number = _numbers(backend, mixed_precision, model, teacher_model, student_dtype, teacher_dtype)

    share = 1 / processes if backend in ("fsdp2", "zero3") else 1.0
    student_bytes = _student_weights(model, number, share)
    teacher_bytes = 0.0 if teacher_model is model else _teacher_weights(teacher_model, number, share, teacher_bits)
    state_share = 1 / processes if backend == "zero2" else share
    gradients, copies, optimizer = _states(model, number, backend, state_share, optimizer_bytes)
    # Gradients in memory during both forwards: accumulated ones, and the buffers of ZeRO-3.
    accumulated = gradients if gradient_accumulation_steps > 1 or backend == "zero3" else 0.0
    mirrored = gradients if backend == "ddp" else 0.0
    # ZeRO-2 has two buckets, with overlap_comm; ZeRO-3 one.
    around = {"zero2": 2, "zero3": 1}.get(backend, 0) * reduce_bucket_size * number.kept
    if share < 1:
        reused = stage3_max_reuse_distance // 2 if backend == "zero3" else 0
        apart = None if teacher_bits or teacher_model is model else teacher_model
        around += _gathered(model, number.used, apart, number.teacher_used, reused)

    activations = _activations(model, columns, number, gradient_checkpointing)
    teacher_layers = _layers(teacher_model, columns, number.teacher_item, number.teacher_used) or ()
    forward = max((whole for whole, _ in teacher_layers), default=0)
    weights = [found[0].module.weight for found in heads if found is not None]
    if len(weights) == 2:
        loss = _fused_loss(weights, task, columns, number.item, number.item < number.used, device == "cpu")
    else:
        loss = _full_loss(model, task, columns, number.item, number.teacher_item)
    fixed = student_bytes + teacher_bytes + optimizer + accumulated + mirrored + around
    peak = fixed + max(forward, (activations or 0) + loss, gradients - accumulated + copies)
    student_bytes, teacher_bytes, optimizer, peak = map(round, (student_bytes, teacher_bytes, optimizer, peak))
    gradients = round(gradients + mirrored)
    return Memory(student_bytes, gradients, optimizer, teacher_bytes, forward, activations, loss, around, peak)


# The table's columns, and the parts in them.
COLUMNS = {
    "student": "student",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "teacher": "teacher",
    "activations (approximate)": "activations",
    "loss": "loss",
    "gathered, buckets": "backend",
    "peak (approximate)": "total",
}


def memory_table(student: Any, teacher: Any, *, processes: int = 8, **settings: Any) -> str:
    """A Markdown table of `estimate_memory` with these settings: a row for each backend, GiB in each process."""
    titles = ["GiB in each process", "processes", *COLUMNS]
    rows = [titles, ["---"] * len(titles)]
    for backend in BACKENDS:
        count = 1 if backend == "single" else processes
        memory = estimate_memory(student, teacher, backend=backend, processes=count, **settings)
        parts = (getattr(memory, part) for part in COLUMNS.values())
        sizes = ("not known" if x is None else f"{x / 2**30:.{2 if x < 2**30 else x < 10 * 2**30:d}f}" for x in parts)
        rows.append([f"`{backend}`", str(count), *sizes])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _check_settings(
    backend: str,
    mixed_precision: str,
    implementation: str,
    device: str,
    kd_task: str | None,
    teacher_bits: int | None,
    **counts: int,
) -> None:
    check_choice("backend", backend, BACKENDS)
    check_choice("mixed_precision", mixed_precision, PRECISIONS)
    check_choice("kd_loss_implementation", implementation, ("auto", "fused", "full"))
    check_choice("device", device, ("cuda", "cpu"))
    for name, value in counts.items():
        check_number(name, value, low=1)
    if kd_task is not None:
        check_choice("kd_task", kd_task, TASKS)
    if teacher_bits not in (None, 8, 4):
        fail("teacher_bits", repr(teacher_bits), "8, 4 or None", "Leave it out for a teacher that is not quantised.")
    if backend == "single" and counts["processes"] != 1:
        shown = repr(counts["processes"])
        fail("processes", shown, "1 with the backend 'single'", "Name another backend, such as 'ddp'.")


# ---- weights, gradients and optimizer -------------------------------------------------------------------------------


class _Numbers(NamedTuple):
    """Bytes of a number."""

    kept: int  # in the trained weights
    frozen: int  # in the student's other weights
    teacher_kept: int
    used: int  # in the weights during the student's forward, before autocast
    teacher_used: int
    item: int  # in the student's products
    teacher_item: int


def _numbers(
    backend: str, mixed_precision: str, student: nn.Module, teacher: nn.Module, given: Any, teacher_given: Any
) -> _Numbers:
    dtypes = _dtypes(backend, PRECISIONS[mixed_precision], student, teacher, given, teacher_given)
    kept, frozen, teacher_kept, used, teacher_used = (dtype.itemsize for dtype in dtypes)
    autocast = mixed_precision != "no" and backend not in _DEEPSPEED
    item, teacher_item = (2, 2) if autocast else (used, teacher_used)
    return _Numbers(kept, frozen, teacher_kept, used, teacher_used, item, teacher_item)


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _student_weights(model: nn.Module, number: _Numbers, share: float) -> float:
    trained = _trained(model)
    return (trained * number.kept + (_size(model) - trained) * number.frozen) * share


def _teacher_weights(model: nn.Module, number: _Numbers, share: float, bits: int | None) -> float:
    """A quantised teacher is whole in each process: the trainer leaves it where it is."""
    if not bits:
        return _size(model) * number.teacher_kept * share
    quantised = sum(weight.numel() for weight in _linear_weights(model))
    return (_size(model) - quantised) * number.teacher_kept + quantised * bits / 8


def _states(
    model: nn.Module, number: _Numbers, backend: str, share: float, optimizer_bytes: float | None
) -> tuple[float, float, float]:
    """Gradients, DeepSpeed's float32 copies (once of the weights, once of the gradients), states with those copies."""
    deepspeed, trained = backend in _DEEPSPEED, _trained(model)
    copies = trained * 4 * share if deepspeed else 0.0
    states = 2 * (4 if deepspeed else number.kept) if optimizer_bytes is None else optimizer_bytes
    return trained * number.kept * share, copies, trained * states * share + copies


def _gathered(student: nn.Module, item: int, teacher: nn.Module | None, teacher_item: int, reused: int) -> int:
    """Bytes of sharded weights that are whole at once: what of the student stays until backward, and the largest part
    beside it.

    Args:
        item, teacher_item: bytes of a number.
        teacher: None where it is not sharded by itself.
        reused: elements that ZeRO-3 keeps for the backward.
    """
    last = _size(_end(student, "output"))
    kept = (last + min(_size(student) - last, reused)) * item
    largest = 0 if teacher is None else max(_largest(teacher))
    return kept + max(_largest(student)[0] * item, largest * teacher_item)


# ---- activations and loss -------------------------------------------------------------------------------------------


def _activations(
    model: nn.Module, batch: Mapping[str, Tensor], number: _Numbers, gradient_checkpointing: bool
) -> int | None:
    """Bytes that the layers keep for backward; with checkpointing their inputs, and one layer computed again."""
    layers = _layers(model, batch, number.item, number.used)
    if layers is None:
        return None
    whole = [size for size, _ in layers]
    kept = sum(given for _, given in layers) + max(whole, default=0) if gradient_checkpointing else sum(whole)
    if number.item < number.used:  # autocast keeps the weights that it has cast
        kept += sum(weight.numel() for weight in _linear_weights(model)) * number.item
    return kept


def _layers(model: Any, batch: Mapping[str, Tensor], item: int, stream: int) -> list[tuple[int, int]] | None:
    """Bytes that each layer keeps for backward, and those of its input; None: not known.

    In 16 bit with I = 4 H a position keeps 34 H + 5 A L: the inputs of the norms 4 H, of q, k and v 2 H, these three
    6 H, the input of the output projection 2 H, the MLP 18 H, dropout masks 2 H; 5 A L in eager attention alone. A gate
    doubles the MLP's inner tensors, shared heads make k and v smaller.

    Args:
        item: bytes of a number in products; stream: of one between the layers, which autocast leaves in float32.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes: list[Any] = [
        getattr(config, name, None) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    ]
    if not all(isinstance(size, int) for size in sizes):
        if any(type(module).__name__.startswith("Conv") for module in model.modules()):
            return None
        return [(len(main_input(batch)) * len(weight) * item,) * 2 for weight in _linear_weights(model, head=True)]
    hidden, heads, count = sizes
    inner: Any = next((n for n in (getattr(config, name, None) for name in _INNER) if isinstance(n, int)), 4 * hidden)
    inner *= 2 if any(name.endswith(_GATES) for name, _ in model.named_modules()) else 1
    shared = (getattr(config, "num_key_value_heads", None) or heads) / heads
    scores = heads * (2 * item + 1) if getattr(config, "_attn_implementation", None) in (None, "eager") else 0
    main = batch.get(getattr(model, "main_input_name", "input_ids"))
    sides = [(main, count)]
    if getattr(config, "is_encoder_decoder", False):
        count = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", count)
        sides.append((batch.get("decoder_input_ids", main), count))
    made = []
    for column, count in sides:
        rows, length = _rows_and_length(column, config)
        if length is None:
            return None
        position = (2 * stream + (4 + 2 * shared) * item + 2) * hidden + 2 * inner * item + scores * length
        made += [(round(rows * length * position), rows * length * hidden * stream)] * count
    return made


def _rows_and_length(column: Tensor | None, config: Any) -> tuple[int, int | None]:
    """Rows, and positions of a row of token ids or of an image cut into patches; None: not known."""
    patch = getattr(config, "patch_size", None)
    if column is not None and column.dim() > 1 and not column.is_floating_point():
        return column.shape[:-1].numel(), column.shape[-1]
    if column is not None and column.dim() == 4 and isinstance(patch, int):
        return len(column), (column.shape[2] // patch) * (column.shape[3] // patch) + 1
    return 0 if column is None else len(column), None


def _linear_weights(model: nn.Module, head: bool = False) -> list[Tensor]:
    """Weights of the linear layers, with or without the output head."""
    last = _end(model, "output")
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear) and (head or m is not last)]


def _positions(task: Task, batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """Positions with logits, and those that the loss compares."""
    rows, length = _rows_and_length(batch.get("decoder_input_ids", main_input(batch)), None)
    each = length or 1 if task.token_level else 1
    return rows * each, rows * (each - task.shifted)


def _full_loss(model: Any, task: Task, batch: Mapping[str, Tensor], item: int, teacher_item: int) -> int:
    """Both logits, a copy of each where labels are shifted, and in float32 the student's log-softmax and gradient."""
    positions, counted = _positions(task, batch)
    classes = (task.over_tokens and vocabulary_rows(model, written=True)) or 0
    classes = classes or getattr(getattr(model, "config", None), "num_labels", 1)
    wide = positions * 4 if item < 4 else 0  # Accelerate makes the student's logits float32, and so does the loss
    return classes * ((positions + task.shifted * counted) * (item + teacher_item) + wide + 2 * 4 * counted)


def _fused_loss(
    weights: list[Any], task: Task, batch: Mapping[str, Tensor], item: int, casts: bool, on_cpu: bool
) -> int:
    """Tiles of logits, the gradients of weight and hidden states, the teacher's hidden states, a cast weight."""
    (classes, width), (others, teacher_width) = (weight.shape for weight in weights)
    trained, (_, n) = weights[0].requires_grad, _positions(task, batch)
    chunk = min(n, chunk_rows(classes, item, on_cpu=on_cpu))
    rows = group_rows(n, chunk, classes, width, item) if trained else chunk
    weight = classes * width * item * (trained + casts)
    weight += 6 * classes * width if trained and item == 2 and rows < n else 0  # summed in float32
    return (rows * classes + chunk * others + n * (width + teacher_width)) * item + weight


def _largest(model: nn.Module) -> tuple[int, int]:
    """Entries of the largest layer that is gathered by itself, and of the larger embedding."""
    names = layer_classes(model)
    layer = max((_size(m) for m in model.modules() if type(m).__name__ in names), default=_size(model))
    return layer, max(_size(_end(model, "input")), _size(_end(model, "output")))


def _end(model: Any, side: str) -> Any:
    """The model's input or output embeddings; None where it has none."""
    try:
        return getattr(model, f"get_{side}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


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
    for name, candidate in TASKS.items():
        for auto_class in auto_classes(candidate):
            known = auto_class._model_mapping.get(type(config), ())
            for model_class in known if isinstance(known, (tuple, list)) else (known,):
                if name == task or (task is None and model_class.__name__ == named):
                    with torch.device("meta"):
                        model = model_class(config)
                    return model.to(config.dtype) if isinstance(config.dtype, torch.dtype) else model
    expected, fix = f"a config of a model for the task {task!r}", "Give such a config, or another kd_task."
    if task is None:
        expected = "a config that names the architecture of one of the tasks"
        fix = f"Name it, kd_task: {', '.join(TASKS)}."
    fail(argument, f"a {type(config).__name__} with the architecture {named}", expected, fix)


def _task(model: nn.Module, kd_task: str | None) -> Task:
    known = auto_class_of(model)
    if known is None and kd_task is None:
        shown = f"a {type(model).__name__}, which no Auto class knows"
        fail("student", shown, "a model whose task is known", f"Name it, kd_task: {', '.join(TASKS)}.")
    return known[0] if known is not None else TASKS[str(kd_task)]


def _dtypes(
    backend: str, half: Any, student: nn.Module, teacher: nn.Module, given: Any, teacher_given: Any
) -> tuple[Any, ...]:
    """Of the weights of the student, trained and frozen, and of the teacher; in the forwards, of both models."""
    own, teacher_own = _dtype("student_dtype", given), _dtype("teacher_dtype", teacher_given)
    trained = own or next((p.dtype for p in student.parameters() if p.requires_grad), torch.float32)
    frozen, teacher_dtype = own or next(student.parameters()).dtype, teacher_own or next(teacher.parameters()).dtype
    if backend == "fsdp2" and half:  # Accelerate trains in float32, and gathers in half
        return torch.float32, frozen, teacher_dtype, half, half
    if backend in _DEEPSPEED:  # under ZeRO-2 the trainer casts the teacher
        own = half or torch.float32
        wide = backend == "zero3" and teacher_dtype not in HALVES
        teacher_dtype = half or (torch.float32 if wide else teacher_dtype)
        return own, own, teacher_dtype, own, teacher_dtype
    return trained, frozen, teacher_dtype, frozen, teacher_dtype


def _dtype(argument: str, given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not isinstance(dtype, torch.dtype):
        fail(argument, quoted(given), "a dtype of torch or its name", "Write it as 'bfloat16' or 'float32'.")
    return dtype


def _columns(model: Any, task: Task, rows: int, length: int) -> dict[str, Tensor]:
    """A batch of tokens or of images, as the model reads them."""
    name, config = getattr(model, "main_input_name", None), model.config
    if name == "input_ids":
        names = ("input_ids", "decoder_input_ids") if task.encoder_decoder else ("input_ids",)
        return {name: torch.empty(rows, length, dtype=torch.long, device="meta") for name in names}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {name: torch.empty(rows, getattr(config, "num_channels", 3), *sides, device="meta")}
    fix = "Give one of the collator; the meta device will do."
    fail("batch", None, f"a batch, since {type(model).__name__} reads {name}", fix)
