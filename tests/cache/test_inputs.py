"""Whatever of a row the teacher reads is part of what the row is known by: a change of it is found, padding is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd_trainer import CachedTeacher
from kd_trainer.cache.signed_collator import NumberedRows, SignedCollator
from kd_trainer.cache.store import CacheError
from kd_trainer.tasks.kinds import TASKS
from tests.cache.test_cached_teacher import build, cache, losses
from tests.helpers import config_run, tiny

# ---- rows that are known by anything ----


class Reader(nn.Module):
    """Takes every column, of whatever shape; gives logits for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, tiny.CLASSES)

    def forward(self, **inputs: Any) -> Tensor:
        return self.linear(inputs["features"].float().mean(1, keepdim=True))


def patches(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As Qwen2-VL's processor makes images: the patches of all rows one behind the other, and how many there are."""
    batch: dict[str, Any] = {"features": torch.tensor([row["features"] for row in rows]),
                             "labels": torch.tensor([row["labels"] for row in rows])}  # fmt: skip
    images = [image for row in rows for image in row["images"]]
    if images:
        batch["pixel_values"] = torch.cat([torch.tensor(image) for image in images])
        batch["image_grid_thw"] = torch.tensor([[1, len(image), 1] for image in images])
    return batch


def rows_of_patches(count: int = 24) -> list[dict[str, Any]]:
    """None to three images a row, of one to three patches: in some batches as many as there are rows."""
    draw, made = np.random.default_rng(0), []
    for i in range(count):
        images = [draw.normal(size=(draw.integers(1, 4), 2)).astype(np.float32).tolist() for _ in range((i * 7) % 4)]
        made.append({"features": draw.normal(size=3).tolist(), "labels": i % tiny.CLASSES, "images": images})
    return made


def trainer_of(out: Path, data: Any, collator: Any, teacher: Any = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    pair = Reader(), Reader()
    settings = {"per_device_train_batch_size": 3, "train_sampling_strategy": "random", **kwargs}
    trainer = tiny.trainer("plain", out, data=data, pair=(pair[0], teacher or pair[1]), **settings)
    trainer.data_collator, trainer.eval_dataset = collator, None
    return trainer


def test_flattened_patches_in_any_company(tmp_path):
    data, form = rows_of_patches(), {"per_device_eval_batch_size": 5, "max_steps": 16}
    live = losses(trainer_of(tmp_path, data, patches, **form))
    built = trainer_of(tmp_path, data, patches, **form, **cache(tmp_path / "cache", "logits"))
    assert losses(built) == pytest.approx(live, rel=1e-5)
    kinds = CachedTeacher(tmp_path / "cache").manifest["kinds"]
    assert kinds == {"features": "row", "image_grid_thw": "own", "pixel_values": "own"}


CHANGES: dict[str, Any] = {
    "a pixel": lambda row: row["images"][0][0].__setitem__(0, 9.0),
    "an image less": lambda row: row["images"].pop(),
    "an image more": lambda row: row["images"].append([[1.0, 2.0]]),
    "all images": lambda row: row.update(images=[]),
    "the order of images": lambda row: row["images"].reverse(),
    "another column": lambda row: row["features"].__setitem__(1, 9.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_image_is_found(change, tmp_path):
    trainer_of(tmp_path, rows_of_patches(), patches, **cache(tmp_path / "cache", "logits")).build_teacher_cache()
    data = rows_of_patches()
    CHANGES[change](data[5])  # of three images
    with pytest.raises(CacheError, match=r"row 5 (that )?differs"):
        trainer_of(tmp_path, data, patches, **cache(tmp_path / "cache", "logits")).train()


def test_images_that_move_to_another_row_are_found(tmp_path):
    """The batch's tensor of patches stays the same."""
    trainer_of(tmp_path, rows_of_patches(), patches, **cache(tmp_path / "cache", "logits")).build_teacher_cache()
    data = rows_of_patches()
    data[5]["images"].append(data[6]["images"].pop(0))
    with pytest.raises(CacheError, match="row 5 differs"):
        trainer_of(tmp_path, data, patches, **cache(tmp_path / "cache", "logits")).train()


def test_what_belongs_to_no_row_is_refused(tmp_path):
    def mixed(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**patches(rows), "pixel_values": torch.tensor([row["features"] for row in rows]).repeat(2, 1)}

    trainer = trainer_of(tmp_path, rows_of_patches(), mixed, **cache(tmp_path / "cache", "logits"))
    message = (
        r"`data_collator` is one that makes pixel_values \[48, 3\] of 24 rows; expected an entry .*, because a teacher"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_column_that_only_later_rows_have_is_refused(tmp_path):
    """The sample rows do not show it."""
    data = [{**row, "images": []} for row in rows_of_patches(90)]
    data[1]["images"] = [[[1.0, 2.0]]]
    trainer = trainer_of(tmp_path, data, patches, **cache(tmp_path / "cache", "logits"))
    with pytest.raises(
        ValueError, match=r"`data_collator` is one that makes image_grid_thw, pixel_values in some batch"
    ):
        trainer.train()


# ---- single columns ----


def seen(rows: list[dict[str, Any]], collate: Any, task: str = "classification", kinds: Any = None) -> tuple[Any, Any]:
    """(signatures of some rows, kinds), of columns that the teacher reads: all but labels."""
    columns = sorted(set(collate(rows)) - {"labels"})
    reading = SignedCollator(collate, TASKS[task], "labels", columns, kinds)
    found = reading(NumberedRows(rows).__getitems__(list(range(len(rows)))))
    return found.signatures, reading.kinds


def stacked(**columns: Any) -> Any:
    """A collator of columns that are made from the rows' own number x, row by row or for all."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        made = {name: make([row["x"] for row in rows]) for name, make in columns.items()}
        return {
            "features": torch.tensor([[float(row["x"])] for row in rows]),
            "labels": torch.zeros(len(rows)).long(),
            **made,
        }

    return collate


SINGLE: dict[str, Any] = {
    "lists": lambda xs: [[x, "text"] for x in xs],
    "texts": lambda xs: [f"text {x}" for x in xs],
    "tensors of several sizes": lambda xs: [torch.full((x + 1,), 2.0) for x in xs],
    "mappings": lambda xs: [{"a": x} for x in xs],
    "a mapping of tensors": lambda xs: {"deep": {"a": torch.tensor(xs)}},
    "numpy": lambda xs: np.array(xs),
    "booleans": lambda xs: torch.tensor([[x % 2 == 0, x % 3 == 0, x % 5 == 0] for x in xs]),
    "bfloat16": lambda xs: torch.tensor(xs, dtype=torch.bfloat16),
    "three axes": lambda xs: torch.tensor([[[x, 1], [2, 3]] for x in xs]),
    "rows second": lambda xs: torch.tensor([[x + k for x in xs] for k in range(3)]),
    "one behind the other": lambda xs: torch.cat([torch.full((x % 3 + 1, 2), float(x)) for x in xs]),
    "lists behind the other": lambda xs: [x for x in xs for _ in range(x % 3 + 1)],
}


@pytest.mark.parametrize("column", SINGLE)
def test_a_column_of_any_form(column, monkeypatch):
    """A change of one row changes that row's hash and no other; the other rows of the batch change nothing."""
    collate = stacked(extra=SINGLE[column])
    rows = [{"x": x} for x in (1, 2, 3, 4, 5, 6, 8)]
    before, kinds = seen(rows, collate)
    assert len(set(before)) == 7
    again, _ = seen(rows[2:5], collate, kinds=kinds)
    np.testing.assert_array_equal(again, before[2:5])
    alone, _ = seen(rows[3:4], collate, kinds=kinds)
    np.testing.assert_array_equal(alone, before[3:4])
    rows[4] = {"x": 7}
    keep = lambda xs: SINGLE[column](xs)  # noqa: E731
    changed, _ = seen(rows, lambda own: {**stacked(extra=keep)(own), "features": torch.zeros(len(own), 1)}, kinds=kinds)
    plain, _ = seen(
        [{"x": x} for x in (1, 2, 3, 4, 5, 6, 8)],
        lambda own: {**stacked(extra=keep)(own), "features": torch.zeros(len(own), 1)},
        kinds=kinds,
    )
    assert (changed != plain).tolist() == [False] * 4 + [True] + [False] * 2


@pytest.mark.parametrize(
    ("one", "other"),
    [(None, 1), ("a", "b"), (1, 1.0), (True, 1), (torch.tensor(1), torch.tensor(2)), (0.5, 0.25), ([1, 2], [1, 3]),
     (torch.tensor(1), torch.tensor(1.0))],
)  # fmt: skip
def test_what_all_rows_share(one, other):
    """A setting beside the rows: a change of it changes all."""
    rows = [{"x": x} for x in range(4)]
    if isinstance(one, list):
        one, other = torch.tensor([one]), torch.tensor([other])
    found, changed = (seen(rows, stacked(extra=lambda _, v=value: v))[0] for value in (one, other))
    assert not set(found) & set(changed)


def test_one_zero_and_one_nan():
    rows = [{"x": 1}, {"x": 2}]

    def of(values: list[float]) -> Any:
        return seen(rows, stacked(extra=lambda xs: torch.tensor(values)[: len(xs)]))[0]

    np.testing.assert_array_equal(of([0.0, 1.0]), of([-0.0, 1.0]))
    nans = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    one, other = (seen(rows, stacked(extra=lambda xs, n=n: n.expand(len(xs)).clone()))[0] for n in nans)
    np.testing.assert_array_equal(one, other)
    assert (of([float("nan"), 1.0]) != of([0.0, 1.0])).tolist() == [True, False]


def test_columns_do_not_run_into_each_other():
    """The same bytes, divided otherwise between two columns, or in another shape."""
    rows = [{"x": 1}, {"x": 1}]
    found = []
    for a, b in (([1, 2], [3]), ([1], [2, 3])):
        found.append(
            seen(
                rows,
                stacked(a=lambda xs, a=a: torch.tensor([a] * len(xs)), b=lambda xs, b=b: torch.tensor([b] * len(xs))),
            )[0]
        )
    for shape in ((2, 3), (3, 2), (6,)):
        found.append(seen(rows, stacked(a=lambda xs, s=shape: torch.ones(len(xs), *s)))[0])
    assert len({int(each[0]) for each in found}) == len(found)


def test_objects_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="makes objects of type object; expected values that can be compared, because"):
        seen([{"x": 1}, {"x": 2}], stacked(extra=lambda xs: [object() for _ in xs]))


# ---- masks and padding ----


def padded(side: str = "right", to: int = 0, dtype: Any = torch.int64, form: str = "2") -> Any:
    """A collator of rows {"ids", "mask"}, padded on a side to a length at least."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        length = max(to, *(len(row["ids"]) for row in rows))
        gaps = [[0] * (length - len(row["ids"])) for row in rows]
        pairs = list(zip(rows, gaps, strict=True))
        columns = {name: torch.tensor([gap + row[name] if side == "left" else row[name] + gap for row, gap in pairs])
                   for name in ("ids", "mask", "types")}  # fmt: skip
        mask = columns["mask"].to(dtype)
        if form == "4":  # which position attends to which
            mask = torch.tril(torch.ones(length, length, dtype=torch.bool)) & mask.bool()[:, None, None, :]
            mask = mask | torch.eye(length, dtype=torch.bool)
            mask = mask & (columns["mask"].bool()[:, None, :, None])
        return {"input_ids": columns["ids"], "attention_mask": mask, "token_type_ids": columns["types"]}

    return collate


def tokens(*rows: tuple[list[int], list[int]]) -> list[dict[str, Any]]:
    return [{"ids": ids, "mask": mask, "types": [i % 2 for i in range(len(ids))]} for ids, mask in rows]


TEXT = tokens(([1, 2, 3, 4], [1, 1, 1, 1]), ([5, 6], [1, 1]), ([7, 8, 9], [1, 1, 1]), ([5, 6, 6], [1, 1, 1]))


@pytest.mark.parametrize(
    ("dtype", "form"),  # a 4D mask of floats is added: another column
    [(torch.int64, "2"), (torch.bool, "2"), (torch.float32, "2"), (torch.int64, "4"), (torch.bool, "4")],
)
def test_padding_is_no_part_of_a_row(dtype, form):
    found = [seen(TEXT, padded(side, to, dtype, form))[0] for side, to in (("right", 0), ("right", 9), ("left", 7))]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    alone = [seen(TEXT[i : i + 1], padded(dtype=dtype, form=form))[0][0] for i in range(4)]
    np.testing.assert_array_equal(found[0], alone)


def test_a_token_hidden_between_others_is_a_part_of_it():
    rows = tokens(([1, 2, 3], [1, 1, 1]), ([1, 9, 2, 3], [1, 0, 1, 1]), ([1, 9, 9, 2, 3], [1, 0, 0, 1, 1]),
                  ([1, 2, 9, 3], [1, 1, 0, 1]), ([1, 2, 3, 9], [1, 1, 1, 0]))  # fmt: skip
    for row in rows:
        row["types"] = [0] * len(row["ids"])
    found = seen(rows, padded())[0]
    assert len(set(found[:4])) == 4
    assert found[4] == found[0], "what is hidden at the end is padding"


@pytest.mark.parametrize("more", [(), (2,)])
def test_who_reads_whom_is_a_part_of_it(more):
    def collate(rows: list[dict[str, Any]], causal: bool) -> dict[str, Any]:
        batch = padded()(rows)
        all_of_them = torch.ones(len(rows), *more, batch["input_ids"].shape[1], batch["input_ids"].shape[1])
        return {**batch, "attention_mask": all_of_them.tril().bool() if causal else all_of_them.bool()}

    rows = tokens(([1, 2, 3], [1, 1, 1]), ([4, 5, 6], [1, 1, 1]))
    one, other = (seen(rows, lambda own, c=causal: collate(own, c))[0] for causal in (True, False))
    assert not set(one) & set(other)


@pytest.mark.parametrize("name", ["global_attention_mask", "token_type_ids", "position_ids", "pixel_attention_mask"])
def test_other_masks_are_columns(name):
    def collate(rows: list[dict[str, Any]], at: int = 0) -> dict[str, Any]:
        batch = padded()(rows)
        batch[name] = torch.zeros_like(batch["input_ids"])
        batch[name][:, at] = 1
        return batch

    found = [seen(TEXT, lambda rows, at=at: collate(rows, at))[0] for at in (0, 1)]
    assert not set(found[0]) & set(found[1])


def test_a_column_that_is_as_wide_as_a_batch_is_long(tmp_path):
    """Its entries are no tokens, also where the batch is padded to as many."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**padded()(rows), "numbers": torch.tensor([[float(row["ids"][0]), 1.0, 2.0, 3.0] for row in rows])}

    found, kinds = seen(TEXT, collate)
    assert kinds["numbers"] == "row"
    np.testing.assert_array_equal(seen(TEXT[1:3], collate, kinds=kinds)[0], found[1:3])


def test_a_masked_language_model_reads_behind_its_last_label():
    """Without a mask the tokens there matter too."""

    def of(last: int) -> Any:
        rows = [
            {"input_ids": [1, 2, 3, last], "labels": [-100, 2, -100, -100]},
            {"input_ids": [4, 5, 6, 7], "labels": [4] * 4},
        ]
        return seen(rows, tiny.pad, "masked_lm")[0]

    assert (of(4) != of(5)).tolist() == [True, False]


# ---- encoder and decoder ----


@pytest.mark.parametrize("masked", [True, False])
def test_encoder_and_decoder_of_one_length(masked, tmp_path):
    """Padded to one length in some batches: what is of the encoder is not taken for the decoder's."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = tiny.pad(rows)
        if not masked:
            length = 16  # padding would be read
            batch = {k: nn.functional.pad(v, (0, length - v.shape[1]), value=-100 if k == "labels" else 0)
                     if k == "input_ids" else v for k, v in batch.items() if k != "attention_mask"}  # fmt: skip
        return batch

    rows = []
    for i, row in enumerate(tiny.rows("causal_lm", 32)):
        ids = row["input_ids"] if i % 3 else (row["input_ids"] * 6)[:16]
        own = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        rows.append({**own, "labels": (row["labels"] * 6)[: 16 if i % 2 else 5]})
    found = []
    for more in ({}, cache(tmp_path / "cache", "logits")):
        torch.manual_seed(0)
        pair = config_run.bart(16), config_run.bart(24)
        settings = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 5, "max_steps": 16}
        trainer = build("seq2seq_lm", tmp_path / "run", data=rows, pair=pair, **settings, **more)
        trainer.data_collator, trainer.eval_dataset = collate, None
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert len(found[0]) == 16
