"""The synthetic data, rows as tensors, a user's own files, and the message for everything that is wrong with them."""

from __future__ import annotations

import json
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from kd_trainer import MLPConfig, MLPForImageClassification, soft_target_data, synthetic_classification
from kd_trainer.data.own_files import load_classification
from kd_trainer.data.tensor_rows import TensorRows, as_tensors, collate_tensors, split_labelled


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def arrays(split: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    rows = split.with_format("numpy")[:]
    return np.asarray(rows["features"]), np.asarray(rows["labels"])


# synthetic_classification


def test_shapes_types_and_splits() -> None:
    data = synthetic_classification(num_train=12, num_validation=5, num_test=7, num_unlabelled=3)
    assert {name: len(split) for name, split in data.items()} == {
        "train": 12,
        "validation": 5,
        "test": 7,
        "unlabelled": 3,
    }
    for split in data.values():
        assert split.features == {
            "features": datasets.List(datasets.Value("float32"), length=784),
            "labels": datasets.Value("int64"),
        }
        assert split[:2]["features"].shape == (2, 784)
        assert split[0]["labels"].dtype == torch.int64
    assert data["unlabelled"][:]["labels"].tolist() == [-100] * 3
    assert "unlabelled" not in synthetic_classification(num_train=1, num_validation=1, num_test=1)


def test_class_means_are_shared_by_all_splits() -> None:
    data = synthetic_classification(num_train=600, num_validation=200, num_test=200, signal=0.3, seed=3)
    features, labels = arrays(data["train"])
    means = np.stack([features[labels == label].mean(0) for label in range(10)])
    for split in ("validation", "test"):
        rows, targets = arrays(data[split])
        nearest = ((rows[:, None] - means) ** 2).sum(-1).argmin(1)
        assert (nearest == targets).mean() > 0.95
        assert not np.array_equal(rows[:200], features[:200])


def test_signal_and_noise_have_the_stated_sizes() -> None:
    data = synthetic_classification(num_train=4000, num_validation=1, num_test=1, signal=0.5, num_classes=4)
    features, labels = arrays(data["train"])
    means = np.stack([features[labels == label].mean(0) for label in range(4)])
    assert means.std() == pytest.approx(0.5, rel=0.05)
    assert (features - means[labels]).std() == pytest.approx(1, rel=0.01)
    assert np.bincount(labels).min() > 900


def test_determinism_and_independence_of_the_splits() -> None:
    small = synthetic_classification(num_train=20, num_validation=5, num_test=5, seed=1)
    again = synthetic_classification(num_train=20, num_validation=5, num_test=5, seed=1)
    large = synthetic_classification(num_train=50, num_validation=9, num_test=5, num_unlabelled=4, seed=1)
    other = synthetic_classification(num_train=20, num_validation=5, num_test=5, seed=2)
    for split in small:
        for values, same, more in zip(*(arrays(data[split]) for data in (small, again, large)), strict=True):
            assert np.array_equal(values, same)
            assert np.array_equal(values, more[: len(values)])
        assert not np.array_equal(arrays(small[split])[0], arrays(other[split])[0])


def test_label_noise_touches_train_labels_only() -> None:
    sizes = {"num_train": 2000, "num_validation": 50, "num_test": 50, "num_features": 3, "num_classes": 4}
    clean = synthetic_classification(**sizes)
    noisy = synthetic_classification(**sizes, label_noise=0.25)
    changed = arrays(clean["train"])[1] != arrays(noisy["train"])[1]
    assert changed.mean() == pytest.approx(0.25, abs=0.03)
    assert set(arrays(noisy["train"])[1][changed]) == {0, 1, 2, 3}
    assert np.array_equal(arrays(clean["train"])[0], arrays(noisy["train"])[0])
    for split in ("validation", "test"):
        assert np.array_equal(arrays(clean[split])[1], arrays(noisy[split])[1])
    every = synthetic_classification(**sizes, label_noise=1.0)
    assert (arrays(clean["train"])[1] != arrays(every["train"])[1]).all()


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"num_train": 0}, ValueError, "`num_train` is 0; expected a finite number >= 1"),
        ({"num_test": 10.0}, TypeError, "`num_test` is 10.0; expected a whole number"),
        ({"num_unlabelled": -1}, ValueError, "`num_unlabelled` is -1; expected a finite number >= 0"),
        ({"num_features": 0}, ValueError, "`num_features` is 0"),
        ({"num_classes": 1}, ValueError, "`num_classes` is 1; expected a finite number >= 2"),
        ({"signal": -0.5}, ValueError, "`signal` is -0.5; expected a finite number >= 0"),
        ({"signal": float("nan")}, ValueError, "`signal` is nan"),
        ({"label_noise": 1.5}, ValueError, r"`label_noise` is 1.5; expected a number in \[0, 1\]"),
        ({"seed": -1}, ValueError, "`seed` is -1"),
    ],
)
def test_bad_settings(settings, error, match) -> None:
    with pytest.raises(error, match=match):
        synthetic_classification(**settings)


# soft_target_data


def test_soft_targets_are_distributions() -> None:
    data = soft_target_data(30, 5, 4, seed=1)
    assert data.features == {
        "features": datasets.List(datasets.Value("float32"), length=5),
        "soft_targets": datasets.List(datasets.Value("float32"), length=4),
    }
    targets = data[:]["soft_targets"]
    assert targets.shape == (30, 4)
    assert (targets > 0).all()
    torch.testing.assert_close(targets.sum(-1), torch.ones(30))
    assert torch.equal(targets, soft_target_data(30, 5, 4, seed=1)[:]["soft_targets"])
    with pytest.raises(ValueError, match="`num_examples` is 0"):
        soft_target_data(0)


def test_the_reference_figures_of_the_linear_student() -> None:
    torch.manual_seed(42)
    rows = as_tensors(soft_target_data(seed=None))[:]
    student = nn.Linear(10, 10)
    assert torch.equal(rows["features"], soft_target_data()[:]["features"])

    def loss() -> torch.Tensor:
        log_probs = student(rows["features"]).log_softmax(-1)
        return F.kl_div(log_probs, rows["soft_targets"], reduction="batchmean")

    assert loss().item() == pytest.approx(0.0735, abs=5e-5)
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    assert loss().item() == pytest.approx(0.03233, abs=1e-5)


# TensorRows


def contiguous(column: str, rows: datasets.Dataset) -> int:
    array = rows.data.column(column).chunk(0)
    return (array.flatten() if pa.types.is_fixed_size_list(array.type) else array).buffers()[1].address


def test_tensor_rows_equal_the_torch_format_without_a_copy() -> None:
    train = synthetic_classification(num_train=40)["train"]
    rows = as_tensors(train)
    assert rows.columns["features"].data_ptr() == contiguous("features", train)
    assert rows.column_names == ["features", "labels"]
    assert len(rows) == 40
    for row, expected in ((rows[7], train[7]), (rows[-1], train[-1]), (rows[3:20:4], train[3:20:4])):
        assert row.keys() == expected.keys()
        for name in row:
            assert row[name].dtype == expected[name].dtype
            assert torch.equal(row[name], expected[name])
    with pytest.raises(IndexError):
        rows[40]
    before = train[0]["features"]
    rows[0]["features"].zero_()
    assert torch.equal(train[0]["features"], before), "a row must be a copy: the column may be read-only memory"


def test_tensor_rows_of_every_layout(tmp_path) -> None:
    columns = {
        "fixed": datasets.List(datasets.Value("float32"), length=3),
        "open": datasets.List(datasets.Value("int32")),
        "nested": datasets.List(datasets.List(datasets.Value("float64"))),
        "array": datasets.Array2D((2, 2), "float32"),
        "half": datasets.Value("float16"),
        "flag": datasets.Value("bool"),
        "label": datasets.ClassLabel(names=["a", "b"]),
    }
    values = {
        "fixed": [[i, 1.5, 2] for i in range(6)],
        "open": [[i, i + 1] for i in range(6)],
        "nested": [[[i, 2.0], [3.0, 4.0]] for i in range(6)],
        "array": [[[i, 2.0], [3.0, 4.0]] for i in range(6)],
        "half": [0.5 * i for i in range(6)],
        "flag": [i % 2 == 0 for i in range(6)],
        "label": [i % 2 for i in range(6)],
    }
    made = datasets.Dataset.from_dict(values, features=datasets.Features(columns))
    made.save_to_disk(str(tmp_path / "saved"))
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    joined = datasets.concatenate_datasets([made.select(range(2)), made.select(range(2, 6))])
    for dataset in (made, loaded, joined, made.select([5, 0, 3]), made.select(range(2, 5)), made.shuffle(seed=0)):
        rows = as_tensors(dataset)
        assert len(rows) == len(dataset)
        for name in columns:
            expected = torch.tensor(dataset.with_format(None)[:][name])
            assert rows.columns[name].tolist() == expected.tolist(), name
    assert as_tensors(made).columns["half"].dtype == torch.float16
    assert as_tensors(made).columns["label"].dtype == torch.int64
    assert len(as_tensors(made.select([]))) == 0


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ([[1.0, 2.0], [1.0]], ValueError, "`column x` is 1 numbers in row 1; expected 2 in every row, as in row 0"),
        ([1.0, None], ValueError, "`column x` is null in row 1; expected a value in every row"),
        ([[1.0, 2.0], [1.0, None]], ValueError, "`column x` is null in row 1"),
        (["a", "b"], TypeError, "`column x` is of type string; expected numbers. Leave the column out"),
    ],
)
def test_columns_that_are_no_tensor(values, error, match) -> None:
    with pytest.raises(error, match=match):
        as_tensors(datasets.Dataset.from_dict({"x": values}))


def test_what_is_no_dataset() -> None:
    with pytest.raises(TypeError, match=r"`dataset` is a DatasetDict; expected a datasets.Dataset"):
        as_tensors(synthetic_classification(num_train=1))
    with pytest.raises(ValueError, match=r"`columns` is \{'a': 1, 'b': 2\} \(rows\)"):
        TensorRows({"a": torch.zeros(1), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="at least one column"):
        TensorRows({})


def test_loader_gives_whole_batches_also_from_workers() -> None:
    train = synthetic_classification(num_train=20, num_features=8)["train"]
    rows = pickle.loads(pickle.dumps(as_tensors(train)))
    expected = [train[start : start + 8] for start in (0, 8, 16)]
    for workers in (0, 2):
        batches = list(DataLoader(rows, batch_size=8, collate_fn=collate_tensors, num_workers=workers))
        assert [len(batch["labels"]) for batch in batches] == [8, 8, 4]
        for batch, reference in zip(batches, expected, strict=True):
            for name in reference:
                assert torch.equal(batch[name], reference[name])


def test_collate_tensors_falls_back_on_single_rows() -> None:
    train = synthetic_classification(num_train=4, num_features=3)["train"]
    batch = collate_tensors([train[2], train[0]])
    assert torch.equal(batch["features"], train[[2, 0]]["features"])
    assert batch["labels"].dtype == torch.int64
    with pytest.raises(ValueError, match="`remove_unused_columns` is True; expected False with TensorRows, because"):
        collate_tensors(["features", "labels"])  # what Trainer's column filter makes of a batch


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_takes_tensor_rows(workers, tmp_path) -> None:
    rows = as_tensors(synthetic_classification(num_train=24, num_features=6)["train"])
    settings = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 6, "seed": 1}
    model = MLPForImageClassification(MLPConfig(num_features=6, hidden_sizes=[4]))
    before = model.layers[0].weight.detach().clone()
    args = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, dataloader_num_workers=workers, save_strategy="no", **settings
    )
    result = Trainer(model, args, train_dataset=rows, data_collator=collate_tensors).train()
    assert result.global_step == 6
    assert not torch.equal(before, model.layers[0].weight)
    if workers == 0:
        args = TrainingArguments(str(tmp_path), **settings)
        with pytest.raises(ValueError, match="`remove_unused_columns` is True; expected False with TensorRows"):
            Trainer(model, args, train_dataset=rows, data_collator=collate_tensors).train()


# split_labelled


def test_split_labelled_is_stratified_and_complete() -> None:
    train = synthetic_classification(num_train=300, num_features=4)["train"]
    features, labels = arrays(train)
    parts = split_labelled(train, 33, seed=5)
    kept, kept_labels = arrays(parts["labelled"])
    rest, rest_labels = arrays(parts["unlabelled"])
    assert len(kept) == 33
    assert (rest_labels == -100).all()
    wanted = np.bincount(labels, minlength=10) * 33 / 300
    assert (np.abs(np.bincount(kept_labels, minlength=10) - wanted) < 1).all()
    order = {row.tobytes(): index for index, row in enumerate(features)}
    kept_at, rest_at = ([order[row.tobytes()] for row in part] for part in (kept, rest))
    assert sorted(kept_at + rest_at) == list(range(300))
    assert kept_at == sorted(kept_at)
    assert np.array_equal(labels[kept_at], kept_labels)
    both = datasets.concatenate_datasets(list(parts.values()))
    assert both[:2]["features"].shape == (2, 4)
    assert both.features == train.features
    assert arrays(split_labelled(train, 33, seed=5)["labelled"])[0].tobytes() == kept.tobytes()
    assert arrays(split_labelled(train, 33, seed=6)["labelled"])[0].tobytes() != kept.tobytes()


def test_split_labelled_rounds_by_largest_remainder() -> None:
    labels = [0] * 7 + [1] * 2 + [2]
    kept = split_labelled(datasets.Dataset.from_dict({"labels": labels}), 4)["labelled"]["labels"]
    assert sorted(kept) == [0, 0, 0, 1]  # exactly 2.8, 0.8 and 0.4 rows


def test_split_labelled_keeps_other_columns_and_unlabelled_rows() -> None:
    features = datasets.Features({"label": datasets.ClassLabel(num_classes=2), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"label": [0, 1, 0, 1], "text": list("abcd")}, features=features)
    parts = split_labelled(rows, 2)
    assert parts["unlabelled"].column_names == ["label", "text"]
    assert parts["labelled"].features["label"] == parts["unlabelled"].features["label"] == datasets.Value("int64")
    assert sorted(parts["labelled"]["label"]) == [0, 1]
    assert set(parts["labelled"]["text"]) | set(parts["unlabelled"]["text"]) == set("abcd")
    nested = split_labelled(datasets.concatenate_datasets(list(parts.values())), 1)
    assert len(nested["unlabelled"]) == 3
    with pytest.raises(ValueError, match="`num_labelled` is 3; expected at most 2, the labelled rows"):
        split_labelled(datasets.concatenate_datasets(list(parts.values())), 3)
    with pytest.raises(ValueError, match="`num_labelled` is 0"):
        split_labelled(rows, 0)
    with pytest.raises(ValueError, match="`dataset` is a Dataset with the columns text; expected one column `labels`"):
        split_labelled(rows.remove_columns("label"), 1)


# load_classification


def write_csv(path, features: np.ndarray, labels: list, name: str = "label") -> str:
    lines = [",".join([name, *(f"p{i}" for i in range(features.shape[1]))])]
    lines += [",".join([str(label), *map(str, row)]) for label, row in zip(labels, features.tolist(), strict=True)]
    path.write_text("\n".join(lines))
    return str(path)


def write_parquet(path, features: np.ndarray, labels: list, **columns) -> str:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    pq.write_table(pa.table({"features": lists, "label": labels, **columns}), path)
    return str(path)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).random((6, 4), dtype=np.float32)


LABELS = [0, 1, 2, 0, -100, 2]
SIZES = {"num_features": 4, "num_classes": 3}


def test_the_same_rows_from_every_file_type(values, tmp_path) -> None:
    records = [{"labels": label, "features": row} for label, row in zip(LABELS, values.tolist(), strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    paths = [
        write_csv(tmp_path / "a.csv", values, LABELS),
        write_parquet(tmp_path / "a.parquet", values, LABELS, other=list("abcdef")),
        str(tmp_path / "a.jsonl"),
    ]
    for path in paths:
        data = load_classification(train_file=path, test_file=paths[0], **SIZES)
        assert list(data) == ["train", "test"]
        assert data["train"].features == {
            "features": datasets.List(datasets.Value("float32"), length=4),
            "labels": datasets.Value("int64"),
        }
        assert torch.equal(data["train"][:]["features"], torch.from_numpy(values)), path
        assert data["train"][:]["labels"].tolist() == LABELS


def test_rows_without_labels(values, tmp_path) -> None:
    pq.write_table(pa.table({"features": values.tolist()}), tmp_path / "u.parquet")
    train = write_csv(tmp_path / "a.csv", values, LABELS)
    data = load_classification(train_file=train, unlabelled_file=str(tmp_path / "u.parquet"), **SIZES)
    assert data["unlabelled"][:]["labels"].tolist() == [-100] * 6
    assert load_classification(unlabelled_file=train, **SIZES)["unlabelled"][:]["labels"].tolist() == [-100] * 6


def test_integer_pixels_are_scaled_and_said(values, tmp_path, caplog) -> None:
    pixels = np.array([[0, 255, 51, 102], [0, 1, 0, 1]])
    train = write_csv(tmp_path / "a.csv", pixels, [0, 1])
    dark = write_csv(tmp_path / "b.csv", pixels[1:], [1])
    data = load_classification(train_file=train, validation_file=dark, **SIZES)
    assert torch.equal(data["train"][0]["features"], torch.tensor([0, 255, 51, 102]) / 255)
    assert torch.equal(data["validation"][0]["features"], torch.tensor([0, 1, 0, 1]) / 255), "all splits alike"
    assert "integers from 0 to 255: taken for pixels and divided by 255" in caplog.text
    caplog.clear()
    assert load_classification(train_file=dark, **SIZES)["train"][0]["features"].tolist() == [0, 1, 0, 1]
    counts = write_csv(tmp_path / "c.csv", pixels * 2, [0, 1])
    assert load_classification(train_file=counts, **SIZES)["train"][0]["features"].tolist() == [0, 510, 102, 204]
    floats = write_csv(tmp_path / "d.csv", values, LABELS)
    assert not caplog.text
    with pytest.raises(ValueError, match=r"`train_file` is .*a.csv' with integer features beside a split of floats"):
        load_classification(train_file=train, test_file=floats, **SIZES)


def test_a_column_that_turns_fractional_late_in_the_file(tmp_path) -> None:
    values = np.zeros((12_000, 4))
    values[-1] = 0.25
    path = tmp_path / "late.csv"
    path.write_text("label,a,b,c,d\n" + "".join("0," + ",".join(f"{v:g}" for v in row) + "\n" for row in values))
    data = load_classification(train_file=str(path), **SIZES)
    assert data["train"][-1]["features"].tolist() == [0.25] * 4


def test_images_and_class_labels_of_a_named_dataset(tmp_path) -> None:
    pixels = np.random.default_rng(1).integers(256, size=(3, 2, 2), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    made = datasets.Dataset.from_dict({"image": list(pixels), "label": [2, 0, -1]}, features=features)
    folder = tmp_path / "digits"
    folder.mkdir()
    made.to_parquet(folder / "train-00000.parquet")
    made.select([0]).to_parquet(folder / "test-00000.parquet")
    data = load_classification(dataset_name=str(folder), **SIZES)
    assert set(data) == {"train", "test"}
    assert data["train"][:]["labels"].tolist() == [2, 0, -100]
    assert torch.equal(data["train"][:]["features"], torch.from_numpy(pixels).reshape(3, 4) / 255)


ROW = [0.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (
            pa.table({"x": [1]}),
            "`train_file` is '.*bad.parquet' with the columns x; expected one column `labels` or `label`",
        ),
        (pa.table({"label": [0], "labels": [0], "features": [ROW]}), "with the columns label, labels, features"),
        (pa.table({"label": [0], "features": [ROW[:3]]}), r"with 3 features per row; expected 4 \(`num_features`\)"),
        (pa.table({"label": [0], "a": [1.0], "b": [1.0]}), "with 2 features per row"),
        (pa.table({"label": [0]}), "with 0 features per row"),
        (pa.table({"label": [0, 0], "features": [ROW, ROW[:2]]}), "`column features` is 2 numbers in row 1"),
        (
            pa.table({"label": [0, 3], "features": [ROW, ROW]}),
            "with the label 3 in row 1; expected labels from 0 to 2, or -100",
        ),
        (pa.table({"label": [0, -1], "features": [ROW, ROW]}), "with the label -1 in row 1; .* or set `num_classes`"),
        (
            pa.table({"label": [0.0, 1.5], "features": [ROW, ROW]}),
            "with the label 1.5 in row 1; expected whole numbers",
        ),
        (pa.table({"label": [float("nan")], "features": [ROW]}), "with the label nan in row 0"),
        (
            pa.table({"label": ["cat"], "features": [ROW]}),
            "with labels that are text; expected class ids as whole numbers",
        ),
        (pa.table({"label": [0, None], "features": [ROW, ROW]}), "`column label` is null in row 1"),
        (
            pa.table({"label": [0, 1], "features": [ROW, [0, 0, float("nan"), 0]]}),
            "with nan in row 1, feature 2; .* finite",
        ),
        (pa.table({"label": [0], "features": [[float("inf"), 0, 0, 0]]}), "with inf in row 0, feature 0"),
        (
            pa.table({"label": [0], "a": ["x"], "b": [1.0], "c": [1.0], "d": [1.0]}),
            "`column a` is of type string; expected numbers",
        ),
    ],
)
def test_bad_tables(table, match, tmp_path) -> None:
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises((ValueError, TypeError), match=match):
        load_classification(train_file=str(tmp_path / "bad.parquet"), **SIZES)


def test_bad_files_and_names(values, tmp_path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"`train_file` is '.*none.csv'; expected an existing file. Check the path"
    ):
        load_classification(train_file=str(tmp_path / "none.csv"))
    with pytest.raises(
        ValueError, match=r"`test_file` is 'rows.xlsx'; expected a file ending in .csv, .parquet, .json"
    ):
        load_classification(test_file="rows.xlsx")
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(
        ValueError, match=r"broken.parquet'; expected a readable parquet file with at least one row, because"
    ):
        load_classification(train_file=str(tmp_path / "broken.parquet"))
    (tmp_path / "empty.csv").write_text("label,a,b,c,d\n")
    with pytest.raises(ValueError, match=r"empty.csv'; expected a readable csv file with at least one row, because"):
        load_classification(train_file=str(tmp_path / "empty.csv"), **SIZES)
    (tmp_path / "hole.csv").write_text("label,a,b,c,d\n0,1,2,3,4\n1,1,,3,4\n")
    with pytest.raises(ValueError, match=r"`column b` is null in row 1; expected a value in every row"):
        load_classification(train_file=str(tmp_path / "hole.csv"), **SIZES)
    with pytest.raises(ValueError, match="`dataset_name` is nothing; expected either files or a dataset's name"):
        load_classification()
    with pytest.raises(ValueError, match="`dataset_name` is 'mnist' beside train_file"):
        load_classification(dataset_name="mnist", train_file="a.csv")
    with pytest.raises(ValueError, match="expected a dataset of the hub or a local folder, because `datasets` reports"):
        load_classification(dataset_name=str(tmp_path / "nowhere"))
