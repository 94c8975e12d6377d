"""The memory in which the fused loss computes: of the size that is needed, at its peak no more than full logits take,
and given back when a training ends."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from kd_trainer import DistillationTrainer
from kd_trainer.losses import fused_linear
from kd_trainer.losses.fused_linear import fused_linear_distillation, keeps_tiles
from tests.helpers import tiny

WIDTH, CLASSES = 64, 4096


@pytest.fixture(autouse=True)
def _nothing_kept():
    fused_linear.release_memory()
    yield
    fused_linear.release_memory()


def kept() -> dict[str, int]:
    """Bytes by name."""
    return {name: room.nbytes for name, (room, _) in fused_linear._KEPT.__dict__.items()}


class Live(TorchDispatchMode):
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


class Held(Live):
    """Counts the bytes of all tensors, and of kept memory in which none lies."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.held = sum(room.nbytes for room, user in fused_linear._KEPT.__dict__.values() if user() is None)
        self.peak = max(self.peak, self.now)
        return result


def test_bytes_are_counted_until_they_are_gone():
    live = Live()
    with live:
        one = torch.empty(1000)
        view = one[10:]
        two = torch.cat([one, view])
        assert live.now == live.peak == 4000 + two.numel() * 4
        del one, view
        assert live.now == two.numel() * 4
        two.add_(1)
    assert live.peak == 4000 + two.numel() * 4


def naive(student: Any, teacher: Any, batch: dict, count: int) -> torch.Tensor:
    """As scripts write it: both logits, T 2, alpha 0.7."""
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits
    labels = F.pad(batch["input_ids"], (0, 1), value=-100)[:, 1:].flatten()
    z_s, z_t = (z.float().flatten(0, 1) for z in (student(**batch).logits, teacher_logits))
    soft = F.kl_div(F.log_softmax(z_s / 2, -1), F.softmax(z_t / 2, -1), reduction="none").sum(-1)
    soft = (soft * (labels != -100)).sum() * 4
    return (0.7 * soft + 0.3 * F.cross_entropy(z_s, labels, reduction="sum")) / count


def peak(way: str, rows: int, length: int, tied: bool, accumulated: int, output_dir: Any) -> int:
    """Of the second step, beside the weights."""
    fused_linear.release_memory()
    torch.manual_seed(0)
    pair = [LlamaForCausalLM(tiny.llama_config(h, vocab_size=CLASSES, tie_word_embeddings=tied)) for h in (WIDTH, 96)]
    args = tiny.arguments(output_dir, kd_temperature=2.0, kd_reduction="tokenmean", kd_loss_implementation="fused")
    trainer = DistillationTrainer(model=pair[0], teacher_model=pair[1], args=args)
    ids = torch.randint(1, CLASSES, (rows, length))
    batch, count = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, rows * (length - 1) * accumulated
    optimizer = torch.optim.SGD(pair[0].parameters(), 1e-3)
    for _ in range(2):
        gc.collect()
        live = Held()
        for model in pair:
            live.leave_out(model)
        with live:
            for _ in range(accumulated):
                if way == "naive":
                    naive(*pair, batch, count).backward()
                else:
                    trainer.compute_loss(pair[0], {**batch, "labels": ids}).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak


SIZES = [(1, 8, 1), (2, 17, 2), (3, 12, 1), (16, 32, 1)]  # 33 positions: the first whose tiles are kept


@pytest.mark.parametrize(
    ("rows", "length", "accumulated", "tied"),
    [*((*size, True) for size in SIZES), *((*SIZES[i], False) for i in (0, -1))],
)
def test_a_step_holds_no_more_than_one_with_full_logits(rows, length, accumulated, tied, tmp_path):
    fused, full = (peak(way, rows, length, tied, accumulated, tmp_path) for way in ("fused", "naive"))
    assert fused <= 1.005 * full
    if rows == 16:
        assert fused < 0.6 * full


@pytest.mark.parametrize("positions", [1, WIDTH // 2, WIDTH // 2 + 1, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_no_buffer_is_larger_than_the_logits_it_replaces(positions, dtype, trained):
    generator = torch.Generator().manual_seed(0)
    sizes = ((positions, WIDTH), (CLASSES, WIDTH), (positions, 96), (CLASSES, 96))
    hidden, weight, *teacher = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    labels = torch.zeros(positions, dtype=torch.long)
    requested: list[tuple[str, int]] = []
    own = fused_linear.kept_memory

    def kept_memory(name: str, rows: int, columns: int, like: torch.Tensor, **options: Any) -> torch.Tensor:
        requested.append((name, rows))
        return own(name, rows, columns, like, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_linear, "kept_memory", kept_memory)
        loss = fused_linear_distillation(hidden.requires_grad_(), weight.requires_grad_(trained), *teacher, labels)
        loss.total.backward()
    assert all(rows <= positions for name, rows in requested if name != "gradient")
    tiles = {name for name in kept() if name != "gradient"}
    assert bool(tiles) == keeps_tiles(positions, WIDTH)
    assert ("gradient" in kept()) == trained


def test_a_large_batch_leaves_nothing_for_small_ones():
    """What was kept of it serves once more and is gone."""
    generator = torch.Generator().manual_seed(0)
    weight, teacher_weight = (torch.randn(CLASSES, width, generator=generator) for width in (WIDTH, 96))
    for positions, names in ((200, {"gradient", "student"}), (10, {"gradient"}), (200, {"gradient", "student"})):
        hidden, other = (torch.randn(positions, width, generator=generator) for width in (WIDTH, 96))
        learned = weight.clone().requires_grad_()
        fused_linear_distillation(hidden, learned, other, teacher_weight).total.backward()
        assert set(kept()) - {"teacher"} == names
        assert kept()["gradient"] < learned.nbytes + 100


@pytest.mark.parametrize("what", ["train", "evaluate", "predict", "check", "fails"])
def test_nothing_is_kept_when_it_is_over(what, tmp_path, monkeypatch):
    torch.manual_seed(0)
    pair = [LlamaForCausalLM(tiny.llama_config(h)) for h in (16, 24)]
    settings = {"kd_loss_implementation": "fused", "kd_reduction": "tokenmean", "max_steps": 2}
    trainer = tiny.trainer("causal_lm", tmp_path, pair=pair, eval_strategy="steps", eval_steps=1, **settings)
    seen: list[dict[str, int]] = []
    own = fused_linear._all_tiles
    monkeypatch.setattr(fused_linear, "_all_tiles", lambda *given: (own(*given), seen.append(kept()))[0])
    if what == "fails":
        monkeypatch.setattr(trainer, "log", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    elif what == "predict":
        trainer.args.prediction_loss_only = True
        trainer.predict(trainer.eval_dataset)
    elif what == "evaluate":
        trainer.args.prediction_loss_only = True
        trainer.evaluate()
    else:
        getattr(trainer, what)()
    assert any(seen)
    assert kept() == {}
