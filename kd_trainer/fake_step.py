"""One training step on tensors that have shapes and no contents: how many bytes are alive when.

For: `memory.py`. The teacher's forward, the student's, a stand-in for the loss and backward run as ever; whatever they
make is counted until it is gone, so that no architecture has a formula here. What FSDP2 and ZeRO-3 gather is counted
beside it, module by module.
Letters: N counted positions, H hidden size, V vocabulary; s and t of student and teacher.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backends import layer_classes
from .checks import fail, message
from .divergences import BLOCK_ACCELERATOR
from .fused_arguments import CHUNK_ROWS, chunk_rows, group_rows
from .fused_forward import SMALL_VOCABULARY, NotPlain, OutputHead
from .fused_linear import keeps_tiles
from .head import Head
from .inputs import accepted_inputs, behind_front, model_inputs, vocabulary_rows
from .losses import SoftTargetLoss
from .teacher import LiveTeacher, adapters_off
from .teacher_batch import floating_dtypes

_Heads = tuple[nn.Linear, nn.Linear]  # the output heads of student and teacher
_WITHOUT_MASK = "sdpa_without_mask"
_FEW = 2**15  # logits whose loss takes hardly any memory


def without_contents(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with weights of `dtype` that hold nothing, made under a `FakeTensorMode`; tied ones stay tied."""

    def like(tensor: Tensor) -> Tensor:
        made = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    made: Any = copy.deepcopy(model, {id(t): like(t) for t in (*model.parameters(), *model.buffers())})
    if getattr(getattr(made, "config", None), "_attn_implementation", None) == "sdpa":
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        # Upstream leaves masks out where all rows are full. It cannot see that here, and would build them.
        AttentionInterface.register(_WITHOUT_MASK, sdpa_attention_forward)
        made.set_attn_implementation(_WITHOUT_MASK)
    return made


class FakeStep:
    """A step under a `FakeTensorMode`; afterwards the attributes say what it took, in bytes.

    Args:
        autocast: the dtype of mixed precision where the forward casts; None where it does not.
        gradient_bytes: what of an entry of a gradient stays in this process, 0 where that is counted elsewhere.
        bucket_bytes: what backward takes besides.
        on_cpu: the sizes of a run on CPU, where the fused loss of many positions keeps its tiles from step to step.

    Attributes:
        peak: beside weights, optimizer and buckets.
        teacher_forward, activations, loss: as in `memory.Memory`.
        gathered: the most weights that were gathered at once; tiles: of the fused loss.
    """

    def __init__(self, *, autocast: torch.dtype | None, gradient_bytes: float, bucket_bytes: int, on_cpu: bool) -> None:
        self.autocast, self.on_cpu = autocast, on_cpu
        self.gradient_bytes, self.bucket_bytes = gradient_bytes, bucket_bytes
        self.live, self.in_backward = _Live(), False
        self.teacher_forward = self.activations = self.loss = self.gathered = self.tiles = 0
        self._units: list[_Unit] = []
        self._gathered = self._kept = 0

    @property
    def peak(self) -> int:
        return self.live.peak

    def gather(self, size: int) -> None:
        """So many bytes more of gathered weights, or less."""
        self._gathered += size
        self.gathered = max(self.gathered, self._gathered)
        self.live.hold(size)

    def run(self, student: nn.Module, teacher: nn.Module, head: Head, batch: Mapping[str, Tensor], way: str) -> None:
        """Once, on a batch of which only shapes and dtypes are read.

        Args:
            teacher: the student itself where it is its own, with its adapters off.
            way: kd_loss_implementation.

        Raises:
            ValueError: a forward that depends on what its tensors hold; "fused" with models that have full logits.
        """
        batch = {name: torch.empty(column.shape, dtype=column.dtype) for name, column in batch.items()}
        try:
            self._run(student, teacher, head, batch, _output_heads(student, teacher, head, way))
        except (RuntimeError, NotImplementedError) as error:
            shown = f"a {type(student).__name__}, which does not run on tensors without contents"
            said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            mend = "Measure a few steps of a smaller pair instead."
            text = message("student", shown, "a forward that depends on shapes alone", mend, because=said)
            raise ValueError(text) from error

    def _run(
        self, student: nn.Module, teacher: nn.Module, head: Head, batch: dict[str, Tensor], heads: _Heads | None
    ) -> None:
        live = self.live
        for model in {student: None, teacher: None}:
            self._watch(model)
        asked = LiveTeacher(teacher).inputs(batch)
        if teacher is not student:
            dtype = next(iter(floating_dtypes(teacher)), None)
            asked = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in asked.items()}
        inputs = model_inputs(batch, accepted_inputs(student)) | {k: v for k, v in asked.items() if k == "use_cache"}
        with live:
            with torch.no_grad(), adapters_off(student) if teacher is student else nullcontext():
                taught = self._ask(teacher, asked, head, heads and heads[1])
            self.teacher_forward, before = live.peak - live.now, live.made - _storage(taught)
            whole = weight = 0
            if heads:
                self._measure_tiles(taught, heads, head)
                # The teacher's head is gathered for the loss, outside of the teacher's forward.
                gathered = {id(p) for unit in self._units for p in unit.parameters}
                whole = sum(_size(p) for p in heads[1].parameters() if id(p) in gathered)
                weight = _size(heads[0].weight) if self.on_cpu and heads[0].weight.requires_grad else 0
                self.gather(whole)
                live.hold(weight + self._kept)
            made = self._ask(student, inputs, head, heads and heads[0])
            self.activations = live.made - before - _storage(taught) - (0 if heads else _storage(made))
            live.hold(-weight)  # the memory that the gradient lies in is kept too
            peak, live.peak = live.peak, live.now
            loss = self._fused_loss(made, taught, heads, head) if heads else self._full_loss(made, taught, head)
            self.loss = live.peak - live.held - before - self.activations + self._kept
            live.peak = max(live.peak, peak)
            del made, taught
            self.gather(-whole)
            live.hold(self.bucket_bytes)
            self.in_backward = True
            loss.backward()

    def _watch(self, model: nn.Module) -> None:
        self.live.leave_out(model)
        in_units = {id(p) for unit in self._units for p in unit.trained}
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in in_units:
                parameter.register_post_accumulate_grad_hook(self.reduced)
        if self.autocast and not self.on_cpu:  # on GPUs autocast normalises in float32
            for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
                norm.register_forward_pre_hook(lambda _, given: tuple(x.float() for x in given))

    def _ask(self, model: nn.Module, inputs: dict[str, Any], head: Head, output_head: nn.Module | None) -> Tensor:
        """The logits; or the hidden states, where the output head is left out as `fused_forward` does."""
        if output_head is None:
            with self._cast():
                logits = behind_front(head.logits(model(**inputs), "model"), model, inputs)
            return logits.float() if self.autocast and torch.is_grad_enabled() else logits  # as Accelerate casts
        hidden: list[Tensor] = []

        def forward(states: Tensor) -> Tensor:
            hidden.append(states)
            return states.new_zeros(len(states), 1, 1)

        output_head.forward = forward
        try:
            with self._cast():
                model(**inputs)
        finally:
            del output_head.forward
        return hidden[0]

    def _cast(self) -> AbstractContextManager[Any]:
        # Fake tensors are on CPU; float16 is as large as bfloat16.
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    # ---- the loss ----

    def _full_loss(self, logits: Tensor, taught: Tensor, head: Head) -> Tensor:
        if not head.softmax or logits.numel() < _FEW:
            return logits.float().square().sum()
        logits, taught = (_counted(z, head) if head.token_level else z for z in (logits, taught))
        labels, classes = torch.empty(logits.shape[:-1], dtype=torch.long), min(logits.shape[-1], taught.shape[-1])
        hard = head.hard_loss_sum(logits, labels)
        logits, taught = logits[..., :classes], taught[..., :classes]
        scratch = torch.empty(5, 0 if self.on_cpu else min(logits.numel(), BLOCK_ACCELERATOR))  # smaller on CPU
        soft = SoftTargetLoss(temperature=2.0, reduction="sum")(logits, taught)
        del scratch
        return hard + soft

    def _measure_tiles(self, taught: Tensor, heads: _Heads, head: Head) -> None:
        """Sets `tiles`: what `fused_linear` computes logits and, in half precision, the weight's gradient in."""
        (vocabulary, width), theirs = heads[0].weight.shape, len(heads[1].weight)
        itemsize, trained = (self.autocast or heads[0].weight.dtype).itemsize, heads[0].weight.requires_grad
        n = taught.shape[1] * len(taught) - head.shifted * len(taught)
        chunk = min(n, chunk_rows(vocabulary, itemsize, on_cpu=self.on_cpu))
        rows = group_rows(n, chunk, vocabulary, width, itemsize) if trained else chunk
        lent = 0  # rows of a first visit, whose teacher's logits lie in the gradient's memory
        if self.on_cpu and trained and vocabulary * width // theirs >= min(CHUNK_ROWS, n):
            lent = min(n, 2 * chunk if rows == chunk else rows)
        own = 0 if lent == n or lent > rows else chunk
        self.tiles = ((lent or rows) * vocabulary + own * theirs) * itemsize
        if trained and itemsize == 2 and rows < n:  # summed in float32
            self.tiles += 6 * vocabulary * width
        self._kept = self.tiles if self.on_cpu and keeps_tiles(n, width) else 0

    def _fused_loss(self, hidden: Tensor, taught: Tensor, heads: _Heads, head: Head) -> Tensor:
        hidden, taught = _counted(hidden, head), _counted(taught, head)
        tensors = [hidden, heads[0].weight, taught, heads[1].weight]
        if self.autocast:
            tensors = [tensor.to(self.autocast) for tensor in tensors]
        return _Tiles.apply(*tensors, self.tiles - self._kept)

    # ---- what a backend does to weights and gradients ----

    def shard(self, model: nn.Module, backend: str, reuse: int | None) -> None:
        """Lets the model's weights be gathered while they are used.

        Args:
            backend: "fsdp2" or "zero3".
            reuse: ZeRO-3's stage3_max_reuse_distance; None where no backward follows.
        """
        if backend == "zero3":
            homes: dict[tuple[nn.Parameter, ...], list[nn.Module]] = {}
            for module in model.modules():
                if own := tuple(module.parameters(recurse=False)):
                    homes.setdefault(own, []).append(module)  # a tied weight has two
            after = 0  # entries that are used between a module's forward and the end of the model's
            for own, modules in reversed(homes.items()):
                count = sum(p.numel() for p in own)
                stays = reuse is not None and 2 * after + count <= reuse
                self._units.append(_Unit(self, modules, own, stays, copies=1))
                after += count
            return
        names = layer_classes(model)
        parts: list[tuple[list[Any], bool]] = [
            ([layer], False) for layer in model.modules() if type(layer).__name__ in names
        ]
        first, last = (getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output"))
        # As Accelerate cuts: the head, a tied embedding with it, and what is left stay gathered until backward.
        tied = first is not None and last is not None and first.weight is last.weight
        parts += [([first, last], True)] if tied else [([m], m is last) for m in (first, last) if m is not None]
        seen: set[nn.Parameter] = set()
        for modules, stays in [*parts, ([model], True)]:
            own = tuple(dict.fromkeys(p for module in modules for p in module.parameters() if p not in seen))
            seen |= set(own)
            if own:
                self._units.append(_Unit(self, modules, own, stays and reuse is not None, copies=2))

    def reduced(self, parameter: Tensor) -> None:
        """A gradient is there: this process keeps its share."""
        parameter.grad = None
        self.live.hold(round(parameter.numel() * self.gradient_bytes))


class _Unit:
    """Parameters that are gathered before their modules run, and freed after; at the latest after backward.

    Args:
        stays: they are not freed between forward and backward.
        copies: of the parameters while they are gathered, and of their gradients while these are reduced.
    """

    def __init__(
        self, step: FakeStep, modules: list[nn.Module], parameters: tuple[nn.Parameter, ...], stays: bool, copies: int
    ) -> None:
        self.step, self.parameters, self.copies, self.bytes = step, parameters, copies, sum(map(_size, parameters))
        self.trained = [p for p in parameters if p.requires_grad]
        self._here, self._missing = False, len(self.trained)
        for module in modules:
            module.register_forward_pre_hook(self._gather)
            module.register_full_backward_pre_hook(self._gather)
        if not stays:
            modules[-1].register_forward_hook(self._after_forward)
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _gather(self, *_: Any) -> None:
        if not self._here:
            self._here = True
            self.step.gather(self.bytes)
            self._pass(self.bytes * (self.copies - 1))

    def _after_forward(self, *_: Any) -> None:
        if not self.step.in_backward:  # where checkpointing runs forwards too
            self._free()

    def _free(self) -> None:
        if self._here:
            self._here = False
            self.step.gather(-self.bytes)

    def _pass(self, size: int) -> None:
        """Bytes that are there for a moment."""
        self.step.live.hold(size)
        self.step.live.hold(-size)

    def _arrived(self, _: Tensor) -> None:
        self._missing -= 1
        if not self._missing:
            self._pass(sum(_storage(p.grad) for p in self.trained if p.grad is not None) * (self.copies - 1))
            for parameter in self.trained:
                self.step.reduced(parameter)
            self._free()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _output_heads(student: nn.Module, teacher: nn.Module, head: Head, way: str) -> _Heads | None:
    """Both output heads where the loss is computed inside them, as `first_look` decides."""
    rows = vocabulary_rows(student, written=True)
    if way == "fused" and not head.over_tokens:
        expected = "'auto' or 'full' where the task is no language model's"
        fail("kd_loss_implementation", repr(way), expected, "Leave it at 'auto'.")
    if way == "full" or not head.over_tokens or (way == "auto" and rows is not None and rows < SMALL_VOCABULARY):
        return None
    try:
        return OutputHead(student).module, OutputHead(teacher).module
    except NotPlain as reason:
        if way == "auto":
            return None
        mend = "Set it to auto: it takes full logits where it must."
        fail("kd_loss_implementation", repr(way), "'auto' or 'full' with these models", mend, because=str(reason))


def _counted(tensor: Tensor, head: Head) -> Tensor:
    """[N, ...]: all positions; where labels are shifted, a copy without the last of each row."""
    rows = tensor.flatten(0, 1)
    if not head.shifted:
        return rows
    return rows.index_select(0, torch.empty(len(rows) - len(tensor), dtype=torch.long))


class _Tiles(torch.autograd.Function):
    """The fused loss: takes the memory of its tiles, and gives gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, taught: Tensor, theirs: Tensor, tiles: int) -> Tensor:
        room = torch.empty(tiles, dtype=torch.uint8)
        ctx.save_for_backward(torch.empty_like(hidden), torch.empty_like(weight) if ctx.needs_input_grad[1] else None)
        del room
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return *ctx.saved_tensors, None, None, None


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on, until they are gone, and those that others hold."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.held = self.peak = 0
        self._seen: dict[int, Any] = {}

    @property
    def now(self) -> int:
        return self.made + self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.made -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.made += size
        self.peak = max(self.peak, self.now)

    def leave_out(self, model: nn.Module) -> None:
        """Weights are counted elsewhere."""
        self._seen |= {tensor.untyped_storage()._cdata: tensor for tensor in (*model.parameters(), *model.buffers())}

    def hold(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.now)
