"""Class names of teacher and student: what people vary is the same name; anything else is refused or warned about."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForSequenceClassification, BertForTokenClassification

from kd_trainer import CachedTeacher
from kd_trainer.compatibility import class_order, match_classes, normalised
from tests import tiny

STUDENT, TEACHER = ["entailment", "neutral", "contradiction"], ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]


def build(names, cls=BertForSequenceClassification, hidden: int = 16, **kwargs):
    """A classifier with these class names, a list or an id2label."""
    ids = dict(enumerate(names)) if isinstance(names, list) else names
    model = cls(tiny.bert_config(hidden, id2label=None, label2id=None, num_labels=len(ids), **kwargs))
    model.config.id2label = ids
    return model


def order(ours, theirs, remap: bool = True):
    found = class_order(build(ours), build(theirs), remap=remap)
    return None if found is None else found.tolist()


# ---- the same names ----


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("entailment", "ENTAILMENT"),
        ("not_entailment", "Not Entailment"),
        ("not_entailment", "not-entailment"),
        ("not_entailment", "NotEntailment"),
        ("B-PER", "B_PER"),
        ("B-PER", "b per"),
        ("World News", " world_news "),
        ("caf\u00e9", "CAFE\u0301"),  # composed and decomposed
        ("stra\u00dfe", "STRASSE"),
        ("a\u2013b", "a-b"),  # a longer dash
        ("n/a", "N.A"),
        ("LABEL:3", "label_3"),
        ("\uff21", "a"),  # full width
    ],
)
def test_case_and_separators_do_not_count(one, other):
    assert normalised(one) == normalised(other)
    assert order([one, "z"], [other, "z"], remap=False) is None
    assert order([one, "z"], ["z", other]) == [1, 0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-1", "1"),
        ("1.0", "10"),
        ("2-3", "23"),
        ("c++", "c"),
        ("c#", "c"),
        ("not_entailment", "entailment"),
        ("+", "-"),
    ],
)
def test_what_makes_another_name_counts(one, other):
    assert normalised(one) != normalised(other)


def test_names_that_only_case_tells_apart_stay_apart():
    assert order(["us", "US", "it"], ["US", "us", "it"]) == [1, 0, 2]
    assert order(["A-1", "A1"], ["a1", "a-1"]) == [1, 0]  # the separator tells, the case does not
    assert order(["us", "US"], ["us", "US"], remap=False) is None


def test_keys_and_values_of_other_types():
    assert order({"0": "no", "1": "yes"}, {0: "yes", 1: "no"}) == [1, 0]
    assert order({0: 3, 1: 5}, {"0": "5", "1": "3"}) == [1, 0]
    assert order(["no", "yes"], {1: "yes", 0: "no"}, remap=False) is None  # the ids count, not the order of the dict
    student = build(["no", "yes"])
    student.config.id2label = ["no", "yes"]
    assert class_order(student, build(["yes", "no"]), remap=True).tolist() == [1, 0]
    student.config.id2label = {"first": "no", "second": "yes"}
    with pytest.raises(ValueError, match=r"`id2label` is \{'first'.*; expected whole numbers as its keys"):
        class_order(student, build(["yes", "no"]), remap=False)


# ---- other names ----


def test_the_issues_pair_is_refused_without_remap_and_remapped_with_it():
    assert order(STUDENT, TEACHER) == [2, 1, 0]
    with pytest.raises(ValueError, match=r"class 'ENTAILMENT' has id 2; expected id 0 as in the student.*kd_remap_lab"):
        order(STUDENT, TEACHER, remap=False)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (STUDENT, ["yes", "maybe", "no"]),
        (STUDENT, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], TEACHER),
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"]),
        (["entailment", "not_entailment"], ["entailment", "contradiction"]),  # synonyms are not guessed
        (["a", "b", "b"], ["b", "a", "b"]),
        ({1: "a", 2: "b"}, {1: "b", 2: "a"}),
    ],
)
def test_a_remap_that_cannot_be_done_is_an_error(ours, theirs):
    with pytest.raises(
        ValueError, match=r"(`kd_remap_labels` is True; expected|Give both configs the same id2label)"
    ) as e:
        order(ours, theirs)
    for names in (ours, theirs):
        assert ", ".join(map(str, names.values() if isinstance(names, dict) else names)) in str(e.value)


@pytest.mark.parametrize(
    "pair", [(tiny.Plain(), tiny.Plain()), (tiny.Plain(), build(STUDENT)), (build(STUDENT), tiny.Plain())]
)
def test_a_remap_without_names_is_an_error(pair):
    assert class_order(*pair, remap=False) is None
    with pytest.raises(ValueError, match=r"`kd_remap_labels` is True; expected .*a model without id2label"):
        class_order(*pair, remap=True)


def test_a_remap_is_an_error_where_classes_have_no_names_of_their_own(tmp_path):
    run = tiny.trainer("causal_lm", tmp_path, kd_remap_labels=True)
    with pytest.raises(ValueError, match="`kd_remap_labels` is True; expected False for the task 'causal_lm'"):
        run.train()


@pytest.mark.parametrize("theirs", [["entailment", "maybe", "contradiction"], ["yes", "maybe", "no"]])
def test_names_that_differ_are_warned_about_with_both_lists(theirs, caplog):
    with caplog.at_level(logging.WARNING, logger="kd_trainer"):
        assert order(STUDENT, theirs, remap=False) is None
    (record,) = caplog.records
    assert ", ".join(theirs) in record.message
    assert ", ".join(STUDENT) in record.message


@pytest.mark.parametrize("remap", [False, True])
def test_other_numbers_of_classes_are_refused_with_both_lists(remap):
    with pytest.raises(
        ValueError, match=r"2 classes \(no, yes\); expected 3 classes .*\(entailment, neutral, contradict"
    ):
        order(STUDENT, ["no", "yes"], remap=remap)


def test_long_lists_are_cut():
    names = [f"n{i}" for i in range(1000)]
    with pytest.raises(ValueError, match=r"n0, n1") as caught:
        order(names, [*names[1:], names[0]], remap=False)
    assert len(str(caught.value)) < 900


# ---- in training ----


def expected_soft_loss(student, teacher, batch, wanted: list[int]) -> tuple[float, float]:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        z_s, z_t = student.eval()(**inputs).logits, teacher.eval()(**inputs).logits
    losses = []
    for chosen in (z_t[..., wanted], z_t):
        rows_s, rows_t = (F.log_softmax(z / 2, -1) for z in (z_s, chosen))
        losses.append(float(4 * F.kl_div(rows_s, rows_t, log_target=True, reduction="sum")) / len(z_s))
    return losses[0], losses[1]


def data(classes: int = 3):
    return [{**row, "labels": row["labels"] % classes} for row in tiny.rows("classification")]


def test_the_issues_pair_trains_by_name(tmp_path):
    torch.manual_seed(0)
    student, teacher = (build(names, initializer_range=0.5) for names in (STUDENT, TEACHER))
    by_name, by_position = expected_soft_loss(student, teacher, tiny.pad(data()[:8]), [2, 1, 0])
    assert abs(by_name - by_position) > 0.01
    run = tiny.trainer(
        "classification",
        tmp_path,
        pair=(student, teacher),
        data=data(),
        kd_remap_labels=True,
        kd_temperature=2.0,
        max_steps=1,
    )
    run.train()
    assert tiny.logged(run, "soft_loss")[0] == pytest.approx(by_name, rel=1e-5)


def test_multi_label_and_token_classifiers_too(tmp_path):
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    others = ["I_LOC", "B_LOC", "I_PER", "B_PER", "o"]
    torch.manual_seed(0)
    pair = tuple(build(names, BertForTokenClassification, initializer_range=0.5) for names in (tags, others))
    rows = tiny.rows("token_classification")
    with pytest.raises(ValueError, match="kd_remap_labels to true"):
        tiny.trainer("token_classification", tmp_path, pair=pair, data=rows)
    run = tiny.trainer("token_classification", tmp_path, pair=pair, data=rows, kd_remap_labels=True)
    assert run.teacher.class_order.tolist() == [4, 3, 2, 1, 0]
    pair = tuple(build(n, problem_type="multi_label_classification") for n in (tags, others))
    with pytest.raises(ValueError, match="kd_remap_labels to true"):
        tiny.trainer("multi_label_classification", tmp_path, pair=pair)
    run = tiny.trainer("multi_label_classification", tmp_path, pair=pair, kd_remap_labels=True, max_steps=1)
    run.train()
    assert run.teacher.class_order.tolist() == [4, 3, 2, 1, 0]


def test_check_says_the_same_as_training(tmp_path):
    def rows(ours, theirs, **kwargs):
        pair = build(ours), build(theirs)
        run = tiny.trainer("classification", tmp_path, pair=pair, data=data(len(ours)), kd_run="check", **kwargs)
        return [row for row in run.check(evaluate=False) if row.what in ("setup", "classes")]

    (row,) = rows(STUDENT, [name.upper() for name in STUDENT])
    assert row.status == "ok"
    assert "the same 3 names" in row.found
    (row,) = rows(STUDENT, TEACHER)
    assert (row.status, "class 'ENTAILMENT' has id 2" in row.found) == ("error", True)
    (row,) = rows(STUDENT, TEACHER, kd_remap_labels=True)
    assert (row.status, "reordered by name" in row.found) == ("ok", True)
    (row,) = rows(STUDENT, ["yes", "maybe", "no"], kd_remap_labels=True)
    assert (row.status, "`kd_remap_labels` is True" in row.found) == ("error", True)
    (row,) = rows(STUDENT, ["yes", "maybe", "no"])
    assert row.status == "warning"
    assert "yes, maybe, no" in row.found
    assert "entailment, neutral, contradiction" in row.found


# ---- from a cache ----


ROTATED = ["Neutral", "CONTRADICTION", "entailment"]  # its inverse is another order
FORMATS = {"logits": {}, "topk": {"teacher_cache_k": 2}, "sampled": {"teacher_cache_k": 50}}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cache_is_compared_as_a_teacher_is(kind, tmp_path, caplog):
    torch.manual_seed(0)
    student, teacher = (build(STUDENT, initializer_range=0.5) for _ in range(2))
    kept = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_format": kind, **FORMATS[kind]}
    common = {"data": data(), "kd_temperature": 2.0, "max_steps": 1}
    run = tiny.trainer("classification", tmp_path, pair=(student, teacher), **common, **kept)
    run.build_teacher_cache()
    state = {name: value.clone() for name, value in student.state_dict().items()}

    def from_cache(names, **kwargs):
        student = build(names)
        student.load_state_dict(state)
        run = tiny.trainer(
            "classification", tmp_path, pair=(student, CachedTeacher(tmp_path / "cache")), **common, **kwargs
        )
        run.train()
        return run

    same = tiny.logged(from_cache(STUDENT), "soft_loss")[0]
    assert tiny.logged(from_cache([name.title() for name in STUDENT]), "soft_loss")[0] == same
    with pytest.raises(ValueError, match=r"`teacher_cache` is one in which class 'neutral' has id 1; expected id 0"):
        from_cache(ROTATED)
    run = from_cache(ROTATED, kd_remap_labels=True)
    # The student's own logits keep their places, the teacher's move: the same as a live teacher whose classes move.
    again, moved = build(ROTATED), build(STUDENT)
    again.load_state_dict(state)
    moved.load_state_dict(teacher.state_dict())
    live = tiny.trainer("classification", tmp_path, pair=(again, moved), kd_remap_labels=True, **common)
    live.train()
    tolerance = {"logits": 1e-5, "topk": 0.1, "sampled": 0.5}[kind]
    assert tiny.logged(run, "soft_loss")[0] == pytest.approx(tiny.logged(live, "soft_loss")[0], rel=tolerance)
    assert tiny.logged(run, "teacher_agreement") == tiny.logged(live, "teacher_agreement")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="kd_trainer"):
        from_cache(["yes", "maybe", "no"])
    (record,) = [record for record in caplog.records if "cannot be compared by name" in record.message]
    assert "yes, maybe, no" in record.message
    with pytest.raises(ValueError, match="`kd_remap_labels` is True"):
        from_cache(["yes", "maybe", "no"], kd_remap_labels=True)


def test_matching_is_symmetric_in_what_it_knows():
    assert match_classes({0: "a"}, None, remap=False).known is None
    assert match_classes({0: "a", 1: "b"}, {0: "A", 1: "B"}, remap=False) == (None, True)
    assert match_classes({0: "a", 1: "b"}, {0: "c", 1: "d"}, remap=False).known is False
