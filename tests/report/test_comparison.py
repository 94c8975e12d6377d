"""The report against numbers worked out by hand; folders that hold everything, little, or what does not fit."""

from __future__ import annotations

import io
import json
import math
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PredictionOutput

from kd_trainer.report import build_report, load_run, print_table, save_predictions
from kd_trainer.report.comparison import markdown_table

# Probabilities of class 0 on four test rows. Teacher: predicts 0 0 1 1, student: 0 1 1 0; both are right on three rows.
LABELS = torch.tensor([0, 0, 1, 0])
TEACHER = [0.9, 0.8, 0.3, 0.4]
STUDENT = [0.61, 0.41, 0.3, 0.61]
PICTURES = ["learning_curves.png", "reliability.png", "agreement.png", "temperature.png", "divergences.png"]


def logits_of(first):
    """Logits [N, 2] of rows whose first class has these probabilities."""
    return torch.tensor([[p, 1 - p] for p in first]).log()


def right_on(count, rows=100):
    """Logits and labels of a model that is right on the first `count` of `rows` rows."""
    labels = torch.arange(rows) % 2
    predicted = torch.where(torch.arange(rows) < count, labels, 1 - labels)
    return torch.nn.functional.one_hot(predicted, 2) * 3.0, labels


def write_run(folder, predictions=None, *, parameters=None, seconds=None, formula=None, steps=None, results=None):
    folder.mkdir(parents=True, exist_ok=True)
    if predictions:
        save_predictions(folder, *predictions)
    if parameters:
        save_file({"a": torch.zeros(parameters - 3), "b": torch.zeros(3, 1)}, folder / "model.safetensors")
    if seconds is not None or results:
        (folder / "all_results.json").write_text(json.dumps({"train_runtime": seconds, **(results or {})}))
    if formula:
        (folder / "distillation.json").write_text(json.dumps({"formula": formula}))
    if steps:
        log = [{"loss": 2.0 / step, "step": step} for step in range(1, steps + 1)]
        log += [{"eval_accuracy": step / steps, "step": step} for step in (steps // 2, steps)]
        state = {"global_step": steps, "log_history": [*log, {"train_runtime": 7.5, "step": steps}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def pair(tmp_path):
    write_run(tmp_path / "teacher", (logits_of(TEACHER), LABELS), parameters=100, seconds=20.0)
    write_run(
        tmp_path / "kd", (logits_of(STUDENT), LABELS), parameters=40, seconds=5.0, formula="0.7 * soft + 0.3 * hard"
    )
    return [load_run(tmp_path / "teacher"), load_run(tmp_path / "kd", "distilled")]


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_numbers_by_hand(pair, tmp_path):
    report = build_report(pair, tmp_path / "out", plots=False)
    teacher, student = report.rows
    assert (teacher.name, teacher.role, student.role) == ("teacher", "teacher", "student")
    expected = {
        "parameters": 40,
        "compression_ratio": 2.5,
        "test_accuracy_percent": 75.0,
        "gap_points": 0.0,
        "agreement_percent": 50.0,
        "train_seconds": 5.0,
        # Bins of 1/15: two rows at .61, both right; one at .59, wrong; one at .7, right.
        "ece": (2 * 0.39 + 0.59 + 0.3) / 4,
        "nll_nats": -sum(map(math.log, (0.61, 0.41, 0.7, 0.61))) / 4,
        "kl_to_teacher_nats": np.mean([kl(p, q) for p, q in zip(TEACHER, STUDENT, strict=True)]),
        "reverse_kl_nats": np.mean([kl(q, p) for p, q in zip(TEACHER, STUDENT, strict=True)]),
        "jsd_nats": np.mean(
            [(kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 for p, q in zip(TEACHER, STUDENT, strict=True)]
        ),
    }
    for number, value in expected.items():
        assert student.mean(number) == pytest.approx(value, rel=1e-6, abs=1e-9), number
        assert student.std(number) is None
    assert teacher.mean("compression_ratio") == 1.0
    assert teacher.mean("agreement_percent") is None
    assert student.mean("improvement_points") is None


def test_the_overlap_is_shown_of_many_classes_and_of_evaluations(tmp_path):
    """From predictions of more than 20 classes; without them, of language models, as the evaluation has it."""
    z = torch.randn(2, 4, 25, generator=torch.Generator().manual_seed(0))
    write_run(tmp_path / "teacher", (z[0], LABELS))
    write_run(tmp_path / "kd", (z[1], LABELS))
    write_run(tmp_path / "lm", results={"eval_overlap": 0.25})
    runs = [load_run(tmp_path / name) for name in ("teacher", "kd", "lm")]
    report = build_report(runs, tmp_path / "out", plots=False)
    top = z[1].topk(20).indices
    mass = 100 * z[0].double().softmax(-1).gather(-1, top).sum(-1).mean().item()
    assert [row.mean("overlap_percent") for row in report.rows] == [None, pytest.approx(mass), 25.0]
    heading = "| Teacher's mass on the top 20 (%) |"
    assert heading in markdown_table(report)
    assert heading not in markdown_table(build_report(runs[:1], tmp_path / "out", plots=False))


def kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_seeds_give_mean_and_std_and_pair_with_their_teachers(tmp_path):
    runs = []
    for seed, (teacher, student, baseline) in enumerate([(90, 80, 60), (92, 84, 66), (94, 88, 66)]):
        for name, right in (("teacher", teacher), ("distilled", student), ("baseline", baseline)):
            runs.append(load_run(write_run(tmp_path / str(seed) / name, right_on(right), seconds=1.0)))
    report = build_report(runs, tmp_path / "out", plots=False)
    row = {row.name: row for row in report.rows}["distilled"]
    assert row.mean("test_accuracy_percent") == pytest.approx(84.0)
    assert row.std("test_accuracy_percent") == pytest.approx(4.0)
    assert [seed["improvement_points"] for seed in row.seeds] == pytest.approx([20, 18, 22])
    assert row.std("improvement_points") == pytest.approx(2.0)
    assert [seed["gap_points"] for seed in row.seeds] == pytest.approx([10, 8, 6])
    # Right on the first rows, wrong on the last: student and teacher differ where only one of them is right.
    assert [seed["agreement_percent"] for seed in row.seeds] == pytest.approx([90, 92, 94])
    assert "84.0 ± 4.0 | +20.0 ± 2.0 | 8.0 ± 2.0" in markdown_table(report)
    [finding] = report.findings
    assert "“distilled” beats “baseline”: +20.0 points, standard deviation 2.0 over 3 seeds" in finding
    assert "71% of the teacher's lead" in finding  # 20 of 28 points


def test_one_teacher_serves_all_seeds_and_too_few_are_an_error(tmp_path):
    folders = [write_run(tmp_path / name, right_on(90)) for name in ("t0", "t1", "s0", "s1", "s2")]
    students = [load_run(folder, "kd") for folder in folders[2:]]
    rows = build_report([load_run(folders[0], "Teacher"), *students], tmp_path / "out", plots=False).rows
    assert rows[0].role == "teacher"
    assert [seed["agreement_percent"] for seed in rows[1].seeds] == [100, 100, 100]
    teachers = [load_run(folder, "teacher") for folder in folders[:2]]
    with pytest.raises(ValueError, match=r"2 teachers and at least 3 runs named 'kd'; expected one teacher for all"):
        build_report([*teachers, *students], tmp_path / "out", plots=False)


def test_improvement_is_over_the_baseline_of_the_same_ending(tmp_path):
    accuracies = {"baseline": 60, "baseline, 20 epochs": 70, "kd": 65, "kd, 20 epochs": 80}
    runs = [load_run(write_run(tmp_path / name, right_on(right)), name) for name, right in accuracies.items()]
    rows = {row.name: row for row in build_report(runs, tmp_path / "out", plots=False).rows}
    assert rows["kd"].mean("improvement_points") == pytest.approx(5)
    assert rows["kd, 20 epochs"].mean("improvement_points") == pytest.approx(10)
    assert rows["baseline"].mean("improvement_points") is None
    assert rows["baseline, 20 epochs"].mean("improvement_points") is None
    only = [run for run in runs if run.name != "baseline"]
    rows = {row.name: row for row in build_report(only, tmp_path / "out", plots=False).rows}
    assert rows["kd"].baseline.name == "baseline, 20 epochs"


def test_unequal_numbers_of_seeds_compare_with_the_mean(tmp_path):
    runs = [load_run(write_run(tmp_path / f"b{n}", right_on(n)), "baseline") for n in (60, 70)]
    runs += [load_run(write_run(tmp_path / "kd", right_on(80)))]
    report = build_report(runs, tmp_path / "out", plots=False)
    assert report.rows[1].mean("improvement_points") == pytest.approx(15)
    assert "standard deviation 7.1 over 2 seeds" in report.findings[0]


# ---- findings from the numbers ---------------------------------------------------------------------------------------


def verdict(tmp_path, teacher, student, baseline, **write):
    runs = []
    for name, right in (("teacher", teacher), ("distilled", student), ("baseline", baseline)):
        runs.append(load_run(write_run(tmp_path / name, right_on(right), **write)))
    return " ".join(build_report(runs, tmp_path / "out", plots=False).findings)


def test_says_that_there_is_nothing_to_see(tmp_path):
    assert "All 3 models reach 100.0% test accuracy" in verdict(tmp_path, 100, 100, 100)


def test_one_run_is_judged_by_the_test_rows(tmp_path):
    # 4 of 100 rows differ: standard error of the mean difference sqrt(.04 * .96 / 99) = 1.97 points.
    found = verdict(tmp_path, 90, 84, 80)
    assert (
        "“distilled” beats “baseline”: +4.0 points, twice the standard error over 100 test rows 3.9 (one run)" in found
    )
    assert "40% of the teacher's lead" in found


def test_small_gains_are_not_sold_as_gains(tmp_path):
    assert "does not differ from “baseline” beyond the spread: +1.0 points" in verdict(tmp_path, 90, 81, 80)


def test_says_when_distillation_hurts_and_the_teacher_is_no_better(tmp_path):
    found = verdict(tmp_path, 80, 60, 80)
    assert "“distilled” is worse than “baseline”: -20.0 points" in found
    assert "The teacher is no better than the baseline" in found


def test_says_when_the_steps_were_not_equal(tmp_path):
    write_run(tmp_path / "distilled", steps=40)
    write_run(tmp_path / "baseline", steps=20)
    assert "40 against 20 optimizer steps" in verdict(tmp_path, 90, 84, 80)


def test_without_predictions_one_run_is_not_told_from_chance(tmp_path):
    runs = [
        load_run(write_run(tmp_path / n, results={"test_accuracy": a})) for n, a in (("baseline", 0.5), ("kd", 0.9))
    ]
    report = build_report(runs, tmp_path / "out", plots=False)
    assert "differs from “baseline” by +40.0 points in one run" in report.findings[0]


# ---- parts that are missing -----------------------------------------------------------------------------------------


def test_missing_parts_are_dashes_and_notes(tmp_path):
    runs = [load_run(write_run(tmp_path / "teacher", steps=4)), load_run(write_run(tmp_path / "kd", parameters=50))]
    report = build_report(runs, tmp_path / "out")
    table = markdown_table(report).splitlines()
    assert table[2] == "| teacher | – | – | – | – | – | – | – | – | – | 7.5 |"
    assert table[3] == "| kd | 50 | – | – | – | – | – | – | – | – | – |"
    assert [path.name for path in report.files] == ["report.md", "report.json", "learning_curves.png"]
    notes = "\n".join(report.notes)
    assert "baseline=DIR" in notes
    assert "no test_predictions.safetensors in" in notes


def test_eval_accuracy_stands_in_but_is_not_compared(tmp_path):
    write_run(tmp_path / "baseline", results={"test_accuracy": 0.5})
    write_run(tmp_path / "kd", results={"eval_accuracy": 0.9})
    report = build_report([load_run(tmp_path / "baseline"), load_run(tmp_path / "kd")], tmp_path / "out", plots=False)
    assert report.rows[1].mean("test_accuracy_percent") == pytest.approx(90)
    assert report.rows[1].mean("improvement_points") is None
    assert any("kd: its accuracy is eval_accuracy" in note for note in report.notes)


def test_stored_and_measured_accuracy_that_differ_are_noted(tmp_path):
    run = load_run(write_run(tmp_path / "kd", right_on(80), results={"test_accuracy": 0.9}))
    report = build_report([run], tmp_path / "out", plots=False)
    assert report.rows[0].mean("test_accuracy_percent") == pytest.approx(80)
    assert any("test_accuracy 0.9000 in all_results.json is not that" in note for note in report.notes)


def test_no_teacher_and_unlabelled_rows_still_make_a_report(tmp_path):
    logits, _ = right_on(80)
    run = load_run(write_run(tmp_path / "kd", (logits, None)))
    report = build_report([run], tmp_path / "out")
    assert report.rows[0].mean("nll_nats") is None
    assert any("teacher=DIR" in note for note in report.notes)
    assert len(report.files) == 2
    teacher = load_run(write_run(tmp_path / "teacher", (logits, None)))
    report = build_report([teacher, run], tmp_path / "out")
    assert report.rows[1].mean("agreement_percent") == 100
    assert "reliability.png" not in [path.name for path in report.files]


def test_newest_checkpoint_shards_and_names(tmp_path):
    folder = tmp_path / "student"
    for step, count in ((9, 7), (10, 12)):
        write_run(folder / f"checkpoint-{step}", steps=step)
        save_file({"w": torch.zeros(count)}, folder / f"checkpoint-{step}" / "model-1.safetensors")
        save_file({"v": torch.zeros(2, 2)}, folder / f"checkpoint-{step}" / "model-2.safetensors")
        index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
        (folder / f"checkpoint-{step}" / "model.safetensors.index.json").write_text(json.dumps(index))
    run = load_run(folder)
    assert (run.name, run.steps, run.parameters) == ("student", 10, 16)
    assert load_run(folder, "a name").name == "a name"
    assert load_run(folder, "TEACHER").name == "teacher"


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_folder_that_does_not_exist_or_holds_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`run` is '.*nowhere'; expected an existing folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"at least one of trainer_state.json, all_results.json, model.saf"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match=r"`runs` is \[\]; expected at least one run"):
        build_report([], tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("trainer_state.json", b'{"log_history": [', r"trainer_state.json'; expected a JSON file"),
        ("all_results.json", b"[1]", r"all_results.json'; expected a JSON object"),
        ("model.safetensors", b"x", r"model.safetensors'; expected a safetensors file"),
        ("test_predictions.safetensors", b"x", r"test_predictions.safetensors'; expected a safetensors file"),
    ],
)
def test_files_that_are_cut_off_are_named(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path)


def test_predictions_without_labels_or_of_wrong_shape(tmp_path):
    save_file({"logits": torch.zeros(2, 3)}, tmp_path / "test_predictions.safetensors")
    with pytest.raises(ValueError, match=r"expected tensors `logits` and `labels`, not \['logits'\]"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match=r"`predictions` is logits \[2, 3, 4\]; expected logits \[N, C\]"):
        save_predictions(tmp_path, torch.zeros(2, 3, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"logits \[2, 3\] with labels \[3\]; expected one label per row"):
        save_predictions(tmp_path, torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        (torch.zeros(100, 2), torch.zeros(100), "labels that differ in 50 of 100 rows"),
        (torch.zeros(99, 2), torch.zeros(99), "99 and 100 rows"),
        (torch.zeros(100, 3), torch.arange(100) % 2, "3 and 2 classes"),
    ],
)
@pytest.mark.parametrize("rival", ["teacher", "baseline"])
def test_other_test_rows_name_both_folders(tmp_path, logits, labels, reason, rival):
    other = load_run(write_run(tmp_path / rival, right_on(90)))
    student = load_run(write_run(tmp_path / "kd", (logits, labels)))
    message = rf"kd' and '.*{rival}', with {reason}; expected the same test rows in every test_predictions"
    with pytest.raises(ValueError, match=message):
        build_report([other, student], tmp_path / "out", plots=False)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_save_predictions_takes_what_predict_returns(tmp_path):
    output = PredictionOutput(predictions=(np.eye(3), np.ones(2)), label_ids=np.array([0, 1, -100]), metrics={})
    path = save_predictions(tmp_path / "new", output)
    stored = load_file(path)
    assert stored["logits"].dtype == torch.float32
    assert stored["logits"].tolist() == np.eye(3).tolist()
    assert stored["labels"].tolist() == [0, 1, -100]
    assert [file.name for file in path.parent.iterdir()] == ["test_predictions.safetensors"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = save_predictions(tmp_path, torch.zeros(1, 2), [0])
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_predictions(tmp_path, torch.ones(1, 2), [0])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_report_files_are_whole_and_strict(pair, tmp_path):
    write_run(tmp_path / "never", (torch.tensor([[-math.inf, 0.0]] * 4), LABELS), steps=4, formula="1 * soft")
    build_report([*pair, load_run(tmp_path / "never", "a|b")], tmp_path / "out", title="Mine", notes=["Said by hand."])
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]
    content = strict_json(tmp_path / "out" / "report.json")
    assert content["title"] == "Mine"
    assert content["pictures"] == PICTURES
    kd, never = content["rows"][1:]
    assert kd["mean"]["agreement_percent"] == 50
    assert kd["runs"][0]["parameters"] == 40
    assert kd["formulas"] == ["0.7 * soft + 0.3 * hard"]
    assert never["mean"]["kl_to_teacher_nats"] is None  # infinite: the student rules out what the teacher does not
    text = (tmp_path / "out" / "report.md").read_text()
    for part in ("# Mine", "a\\|b", "| inf |", "`0.7 * soft + 0.3 * hard`", "](agreement.png)", "- Said by hand."):
        assert part in text


def test_pictures_open_and_leave_matplotlib_as_it_was(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(40, (200,), generator=generator)  # more classes than the map has room for numbers
    runs = []
    for seed in range(2):
        for name in ("teacher", "baseline", "baseline, long", "distilled, 20 epochs", "another student"):
            logits = 4 * torch.nn.functional.one_hot(labels, 40) + torch.randn(200, 40, generator=generator)
            # The seeds of one name logged at different steps: no mean over steps, no crash.
            steps = 10 + 90 * seed if name == "baseline" else 10
            runs.append(load_run(write_run(tmp_path / str(seed) / name, (logits, labels), steps=steps)))
    before = dict(matplotlib.rcParams)
    modules = set(sys.modules)
    build_report(runs, tmp_path / "out")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in set(sys.modules) - modules
    for name in PICTURES:
        with Image.open(tmp_path / "out" / name) as image:
            image.load()
            assert min(image.size) > 300
            low, high = image.convert("L").getextrema()
            assert low < 100
            assert high == 255


def test_without_matplotlib_the_rest_is_written(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = build_report(pair, tmp_path / "out")
    assert [path.name for path in report.files] == ["report.md", "report.json"]
    assert "pip install kd_trainer[plots]" in (tmp_path / "out" / "report.md").read_text()
    assert sum("pip install" in note for note in report.notes) == 1


@pytest.mark.parametrize("width", [70, 100])
def test_console_table_loses_no_number(tmp_path, width):
    runs = []
    for seed in range(2):
        for name, right in (("teacher", 95), ("distilled, 20 epochs", 85), ("baseline, 20 epochs", 70)):
            folder = write_run(tmp_path / str(seed) / name, right_on(right + seed), parameters=335_114, seconds=1234.5)
            runs.append(load_run(folder))
    report = build_report(runs, tmp_path / "out", plots=False)
    console = Console(file=io.StringIO(), width=width)
    print_table(report, console)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for number in ("335,114", "85.5", "+15.0", "1234.5"):
        assert number in text
    if width == 100:
        assert "85.5 ± 0.7   +15.0 ± 0.0" in text


def test_embeddings_are_compared_by_their_similarities(tmp_path):
    """Widths may differ, and no class is named; without predictions what was evaluated is shown."""
    teacher = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 1.0, 0.0]])
    students = {"distilled": torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), "measured": None}
    folders = [write_run(tmp_path / "teacher", (teacher, torch.full((3,), -100)))]
    for name, embeddings in students.items():
        predictions = None if embeddings is None else (embeddings, torch.full((3,), -100))
        results = {"eval_teacher_spearman": 0.25, "eval_teacher_cosine": 0.875}
        folders.append(write_run(tmp_path / name, predictions, results=results))
        (folders[-1] / "distillation.json").write_text(json.dumps({"task": "embedding", "formula": "loss"}))
    report = build_report([load_run(folder) for folder in folders], tmp_path / "report", plots=False)
    found = {row.name: row.seeds[0] for row in report.rows}
    assert found["distilled"]["teacher_spearman"] == pytest.approx(0.5)
    assert found["measured"]["teacher_spearman"] == 0.25
    assert found["distilled"]["teacher_cosine"] == 0.875
    assert found["distilled"]["agreement_percent"] is found["distilled"]["kl_to_teacher_nats"] is None
    table = markdown_table(report)
    assert "| Cosine to teacher | Similarities against the teacher's (Spearman) |" in table
    assert "| 0.875 | 0.500 |" in table
    assert "0.250" in printed(report)


def test_other_tasks_have_no_columns_of_embeddings(pair, tmp_path):
    report = build_report(pair, tmp_path / "report", plots=False)
    assert "Spearman" not in markdown_table(report) + printed(report)


def printed(report):
    console = Console(file=io.StringIO(), width=200)
    print_table(report, console)
    return console.file.getvalue()
