"""Language models without logits: one forward of each model, in which the output head computes the loss instead.

For: `trainer.py`. While the wrapped student runs, its output head's forward is replaced by one that calls
`fused_linear_distillation`: there FSDP2 and ZeRO-3 have gathered the head's weight, and all hooks around the model
fire as ever. The teacher's head keeps its hidden states instead. The first time, each head gives its model known
logits, which must come out of it as `OutputHead` expects; otherwise `UnsupportedHead` is raised, and the caller takes
full logits.
Letters: B rows, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import FusedLoss, cap_and_scale
from ..validation import fail
from .inputs import text_config, vocabulary_rows
from .logits import logits_of

_SAMPLE = 16  # positions of a row whose product is looked at
_SIZES = (0.1, 1.0, 10.0, 100.0)  # of the known logits, each at one position: a cap shows in the large ones
# Fields of configs: by what the logits are multiplied (or, for `logits_scaling`, in most models divided) and capped.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISOR = "logits_scaling"
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")


# Below it "auto" takes full logits: they cost little, and the fused loss has more calls.
SMALL_VOCABULARY = 2048


class UnsupportedHead(Exception):
    """Why the logits of a model are not its output head's product, scaled and capped in a known way."""


class OutputHead:
    """The output head of a language model, and what the model does to the head's product.

    Args:
        model: unwrapped.

    Attributes:
        scale, softcap: logits = softcap * tanh(scale * (h @ weight.T + bias) / softcap), as in `fused_linear`.
        verified: whether this was seen to be so, in the mode (training or evaluation) that the model is in.

    Raises:
        UnsupportedHead: the model has no such head, or one whose weight cannot be multiplied as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            module: Any = model.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError, TypeError):
            module = None
        name = type(model).__name__
        if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
            raise UnsupportedHead("a compiled forward cannot leave its output head out")
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            raise UnsupportedHead(f"{name} has no plain linear output head")
        if not module.weight.is_floating_point():
            raise UnsupportedHead(f"the output head of {name} is quantised")
        self.module, self.name = module, name
        self.hidden_dtype: torch.dtype | None = None  # of what the head was last given
        self._ways = _ways(model)
        self._verified: set[bool] = set()

    @property
    def verified(self) -> bool:
        """Whether a forward in this mode has been compared with the logits that came out."""
        return self.module.training in self._verified

    @property
    def scale(self) -> float:
        """What the product is multiplied by, as far as is known."""
        return self._ways[0][0]

    @property
    def softcap(self) -> float | None:
        """The cap of the logits, as far as is known; None without."""
        return self._ways[0][1]

    def settle(self, known: Tensor, logits: Tensor, *, training: bool) -> bool:
        """Compares the known logits that the head gave with what came out; True where `scale` and `softcap` were right.

        False: another known way fits, and is now set. Raises UnsupportedHead where none does.

        Args:
            training: the mode in which the forward ran.
        """
        if logits.shape == known.shape:
            room = _room(logits, known)
            for way in self._ways:
                exact = way == (1.0, None)  # the known logits survive every cast
                if _alike(logits, cap_and_scale(known.float(), *way), 0.0 if exact else room):
                    right, self._ways = way == self._ways[0], [way]
                    self._verified.add(training)
                    return right
        raise UnsupportedHead(f"{self.name} does something unknown to the product of its output head")


Heads = tuple[OutputHead, OutputHead | None]


def plain_heads(
    student: nn.Module, teacher: nn.Module | None, over_tokens: bool, implementation: str, *, compiled: bool = False
) -> tuple[Heads | None, str]:
    """The output heads of student and teacher where the loss can do without logits, and a line on why or why not.

    Args:
        teacher: None where its outputs come from a cache.
        over_tokens: whether the task is a language model's. compiled: whether training compiles one of the models.
        implementation: `kd_loss_implementation`; with "fused" it raises ValueError where the heads are not plain.
    """
    if implementation == "fused" and not over_tokens:
        expected = "'auto' or 'full' where the task is no language model's"
        fail("kd_loss_implementation", repr(implementation), expected, "Leave it at 'auto'.")
    rows = vocabulary_rows(student, written=True)
    small = implementation == "auto" and rows is not None and rows < SMALL_VOCABULARY
    if implementation == "full" or not over_tokens or small:
        return None, ""
    try:
        if compiled:
            raise UnsupportedHead("a compiled forward cannot leave its output head out")
        heads = OutputHead(student), None if teacher is None else OutputHead(teacher)
        if heads[1] is not None and heads[0].module.weight.device != heads[1].module.weight.device:
            raise UnsupportedHead("the output heads of student and teacher are on different devices")
    except UnsupportedHead as reason:
        return None, full_logits(reason, implementation)
    return heads, "the loss is computed inside the output heads: no logits are held"


def full_logits(reason: UnsupportedHead, implementation: str) -> str:
    """The line with the reason; an error where `implementation` leaves no choice."""
    if implementation == "fused":
        expected = "'auto' or 'full' with these models"
        fix = "Set kd_loss_implementation to auto: it takes full logits where it must."
        fail("kd_loss_implementation", "'fused'", expected, fix, because=str(reason))
    return f"full logits: {reason}"


def _room(*tensors: Tensor) -> float:
    """The relative difference that rounding makes."""
    return 2e-2 if min(tensor.dtype.itemsize for tensor in tensors) < 4 else 1e-4


def _alike(one: Tensor, other: Tensor, room: float) -> bool:
    one, other = one.detach().float(), other.detach().float()
    small = room * 1e-2 * float(other.nan_to_num().abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=room, atol=small, equal_nan=True)


def _known(product: Tensor) -> Tensor:
    """Logits [B, few, V] for the model to work on, all different; in bfloat16 too they are what they are."""
    rows, _, classes = product.shape
    values = torch.randn(1, len(_SIZES), classes, generator=torch.Generator().manual_seed(0))
    values = values * torch.tensor(_SIZES).view(1, -1, 1) * torch.linspace(0.5, 1, rows).view(-1, 1, 1)
    return values.to(torch.bfloat16).to(product.device, product.dtype)


def _ways(model: nn.Module) -> list[tuple[float, float | None]]:
    """(scale, softcap) that the config hints at, the likeliest first."""
    config = text_config(model)

    def number(name: str) -> list[float]:
        value = getattr(config, name, None)
        return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else []

    caps = [value for name in _CAPS for value in number(name)]
    scales = [value for name in _FACTORS for value in number(name)]
    scales += [scale for value in number(_DIVISOR) for scale in (1 / value, value)]
    return [(scale, cap) for cap in (*caps, None) for scale in dict.fromkeys((*scales, 1.0))]


def few_products(forward: Callable[[], Any], head: OutputHead) -> Tensor:
    """The product of the teacher's head at a few positions [B, few, V]; as `teacher_hidden`."""
    with _replaced(head, _keep) as kept:
        outputs = forward()
    _right(head, kept, outputs)
    return kept["product"]


def teacher_hidden(forward: Callable[[], Any], head: OutputHead) -> Tensor:
    """Final hidden states [B, S, H] of the teacher.

    Args:
        forward: runs the teacher's forward once and returns its outputs.

    Raises:
        UnsupportedHead: see `OutputHead`.
    """
    with _replaced(head, _keep) as kept:
        outputs = forward()
    _right(head, kept, outputs)
    return kept["hidden"]


def student_loss(
    forward: Callable[[], Any], head: OutputHead, loss: Callable[[Tensor, Tensor, Tensor | None], FusedLoss]
) -> tuple[FusedLoss, Any, Tensor]:
    """The loss, computed inside the student's forward, its outputs (whose logits mean nothing), its hidden states.

    Args:
        forward: runs the wrapped student's forward once.
        loss: from hidden states [B, S, H], weight [V, H] and bias of the head.

    Raises:
        UnsupportedHead: see `OutputHead`; or the model gives no hidden state for each position.
    """

    def compute(kept: dict[str, Any], hidden: Tensor, module: nn.Linear) -> Tensor:
        kept["loss"] = computed = loss(hidden, module.weight, module.bias)
        # The forward's outputs depend on the loss, so that what waits for their gradient goes on.
        return (computed.total * 0).nan_to_num()

    while True:
        # A forward that is run again draws the same dropout again.
        drawn = None if head.verified else _random_state(head.module.weight.device)
        try:
            with _replaced(head, compute) as kept:
                outputs = forward()
            right = _right(head, kept, outputs)
        except UnsupportedHead:
            _draw_again(drawn)
            raise
        if right:
            computed, logits = kept["loss"], logits_of(outputs, "model")
            return (
                computed._replace(total=computed.total + 0.0 * logits.float().sum()),
                outputs,
                kept["hidden"].detach(),
            )
        _draw_again(drawn)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None, torch.device]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None, device


def _draw_again(drawn: tuple[Tensor, Tensor | None, torch.device] | None) -> None:
    if drawn is None:
        return
    on_cpu, on_gpu, device = drawn
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)


def _keep(kept: dict[str, Any], hidden: Tensor, module: nn.Linear) -> Tensor:
    return hidden.new_zeros(())


@contextmanager
def _replaced(head: OutputHead, act: Callable[[dict[str, Any], Tensor, nn.Linear], Tensor]) -> Iterator[dict[str, Any]]:
    """While inside, the head's forward keeps the hidden states, lets `act` see them, and returns next to nothing.

    Until the head is verified it returns known logits, and keeps its product at a few positions.
    """
    kept: dict[str, Any] = {}
    module = head.module
    patched = module.__dict__.get("forward")  # accelerate's hooks patch the instance
    original = module.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "hidden" in kept or hidden.dim() != 3:
            # Said afterwards: an exception here would leave FSDP2 and ZeRO-3 in the middle of a forward.
            kept["wrong"] = f"{head.name} does not call its output head once with [batch, sequence, hidden]"
            return original(hidden, *args, **kwargs)
        nothing, kept["hidden"], head.hidden_dtype = act(kept, hidden, module), hidden, hidden.dtype
        if head.verified:  # one position, to which a model may add as many logits
            return hidden.new_zeros(hidden.shape[0], 1, 1) + nothing.to(hidden.dtype)
        with torch.no_grad():
            few = hidden[:, :: max(1, -(-hidden.shape[1] // _SAMPLE))]
            kept["product"] = product = original(few)
            bias = None if module.bias is None else module.bias.to(few.dtype)
            if not _alike(product, F.linear(few, module.weight.to(few.dtype), bias), _room(product, few)):
                kept["wrong"] = f"the output head of {head.name} is more than a product"
            # A teacher that is the student with its adapters off is in eval mode during its forward alone.
            kept["known"], kept["training"] = _known(product), module.training
        return kept["known"] + nothing.to(product.dtype)

    module.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield kept
    except Exception as error:
        if "hidden" not in kept:
            raise
        cause = error.__cause__ or error  # a teacher's error is explained by what raised it
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise UnsupportedHead(f"{head.name} cannot do without its logits ({reason})") from error
    finally:
        if patched is None:
            del module.forward
        else:
            module.forward = patched  # type: ignore[method-assign]


def _right(head: OutputHead, kept: Mapping[str, Any], outputs: Any) -> bool:
    """Whether `scale` and `softcap` were right all along; raises UnsupportedHead."""
    if "wrong" in kept or "hidden" not in kept:
        raise UnsupportedHead(kept.get("wrong", f"{head.name} does not call its output head"))
    if "known" not in kept:  # it was verified before
        return True
    return head.settle(kept["known"], logits_of(outputs, "model"), training=kept["training"])


@contextmanager
def whole_weight(head: OutputHead) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias of a frozen head, gathered from all processes where a backend has sharded them.

    Every process must enter, since gathering is collective.
    """
    module = head.module
    sharded = [p for p in (module.weight, module.bias) if p is not None and hasattr(p, "ds_id")]
    with ExitStack() as stack:
        if sharded:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(sharded))
        weight, bias = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in (module.weight, module.bias))
        yield weight, bias


def student_side(head: OutputHead, weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """The student's output head by the argument names of `fused_linear_distillation`."""
    return {
        "student_weight": weight,
        "student_bias": bias,
        "student_scale": head.scale,
        "student_softcap": head.softcap,
    }


def teacher_side(head: OutputHead, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> dict[str, Any]:
    """The teacher's, for these hidden states of it."""
    if not torch.is_autocast_enabled(hidden.device.type):
        # Under FSDP2 the teacher computes in half precision from weights kept in float32.
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    return {
        "teacher_weight": weight,
        "teacher_bias": bias,
        "teacher_scale": head.scale,
        "teacher_softcap": head.softcap,
    }
