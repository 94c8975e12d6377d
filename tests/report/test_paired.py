"""The paired difference over seeds: its interval against scipy, its share of the teacher's lead, the sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from kd_trainer.report import build_report, load_run
from kd_trainer.report.comparison import markdown_table, print_table
from kd_trainer.report.paired import Metric, mean_interval, paired_differences, sentence, t_quantile
from kd_trainer.report.runs import Run, compare

BASELINE, DISTILLED = [0.60, 0.62, 0.66], [0.68, 0.71, 0.72]


def rows_of(metric, baseline, distilled, teacher=None):
    runs = [Run("baseline", Path(), results={metric: value}) for value in baseline]
    runs += [Run("distilled", Path(), results={metric: value}) for value in distilled]
    return compare([*runs, Run("teacher", Path(), results={} if teacher is None else {metric: teacher})])


def difference(metric, *numbers):
    (found,) = paired_differences(rows_of(metric, *numbers))
    return found


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 30, 101])
def test_the_quantile_is_scipys(degrees, level):
    assert t_quantile(degrees, level) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_the_interval_is_scipys(count):
    values = [0.31, 0.12, -0.05, 0.4, 0.22, 0.18, 0.09, 0.27][:count]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, interval = mean_interval(values)
    assert interval == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert mean == pytest.approx(sum(values) / count)
    assert mean_interval(values[:1]) == (values[0], None)


def test_each_pair_is_of_one_seed():
    found = difference("eval_accuracy", BASELINE, DISTILLED, 0.9)
    assert found.differences == pytest.approx([0.08, 0.09, 0.06])
    paired = stats.ttest_rel(DISTILLED, BASELINE).confidence_interval(0.95)
    assert found.interval == pytest.approx((paired.low, paired.high), rel=1e-9)
    assert found.share == pytest.approx((23 / 300) / (0.9 - 1.88 / 3))
    assert found.helps


@pytest.mark.parametrize(
    ("numbers", "begins", "part"),
    [
        (("accuracy", BASELINE, DISTILLED, 0.9), "Distillation helps: accuracy +7.7 points", "28% of the"),
        (("accuracy", DISTILLED, BASELINE), "Distillation does not help here: accuracy -7.7 points", "over 3 seeds."),
        (("hard_loss", [2.0, 2.1], [1.5, 1.61]), "Distillation helps: hard loss -0.495, where lower is better", ""),
        (("perplexity", [2.0, 2.1], [2.5, 2.61]), "Distillation does not help here: perplexity +0.505", ""),
        (("accuracy", [0.5, 0.6], [0.6, 0.5]), "Whether distillation helps cannot be told from 2 seeds", "more seeds"),
        (("accuracy", [0.5], [0.6]), "Whether distillation helps cannot be told from 1 seed: accuracy +10", "one seed"),
        (("accuracy", [0.5, 0.5], [0.6, 0.6]), "Whether distillation helps cannot be told from 2 seeds", "the same"),
        (("accuracy", [0.5, 0.6], [0.5, 0.6]), "Distillation makes no difference here", "+0.0 to +0.0"),
        (("points", [5, 6, 7], [6, 7, 8]), "Whether a higher points is better is not known", "greater_is_better"),
    ],
)  # fmt: skip
def test_the_sentence(numbers, begins, part):
    text = sentence(difference(f"eval_{numbers[0]}", *numbers[1:]))
    assert text.startswith(begins)
    assert part in text


def test_a_teacher_that_does_not_lead_has_no_share():
    assert difference("eval_accuracy", BASELINE, DISTILLED, 0.5).share is None
    assert difference("eval_accuracy", BASELINE, DISTILLED).share is None
    assert difference("eval_hard_loss", [2.0, 2.0], [1.5, 1.5], 1.0).share == pytest.approx(0.5)


def test_metrics_that_a_run_lacks_and_speeds_are_left_out():
    rows = rows_of("eval_accuracy", BASELINE, [0.7, 0.7, float("nan")])
    assert paired_differences(rows) == []
    assert paired_differences(rows_of("eval_runtime", BASELINE, DISTILLED)) == []
    assert paired_differences(rows_of("eval_accuracy", BASELINE, DISTILLED[:2])) == []


@pytest.mark.parametrize(
    ("name", "higher"),
    [("accuracy", True), ("a_f1", True), ("rougeL", True), ("hard_loss", False), ("perplexity", False), ("x", None)],
)
def test_the_direction_of_a_metric(name, higher):
    assert Metric.of(name).higher_is_better is higher


def folders(tmp_path):
    made = []
    for seed, numbers in enumerate(zip(BASELINE, DISTILLED, strict=True)):
        for name, value in zip(("baseline", "distilled"), numbers, strict=True):
            folder = tmp_path / f"seed-{seed}" / name
            folder.mkdir(parents=True)
            (folder / "all_results.json").write_text(json.dumps({"eval_accuracy": value, "eval_hard_loss": 1 - value}))
            made.append(load_run(folder, name))
    return made


def test_the_report_has_the_differences(tmp_path, capsys):
    report = build_report(folders(tmp_path), tmp_path / "out", plots=False, primary=Metric("accuracy", True))
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["paired"]
    assert [each["metric"] for each in kept] == ["accuracy", "hard_loss"]
    expected = stats.ttest_rel(DISTILLED, BASELINE).confidence_interval(0.95)
    assert kept[0]["interval_95"] == pytest.approx([expected.low, expected.high])
    assert kept[1]["mean"] == pytest.approx(-23 / 300)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| accuracy (%) | – | 62.7 | 70.3 | +7.7 | +3.9 to +11.5 | – |" in text
    assert markdown_table(report) in text
    assert report.findings[0].startswith("Distillation helps: accuracy +7.7 points")
    print_table(report)
    assert "+3.9 to +11.5" in capsys.readouterr().out


def test_without_a_primary_metric_the_findings_are_of_the_spread(tmp_path):
    report = build_report(folders(tmp_path), tmp_path / "out", plots=False)
    assert report.findings[0].startswith("“distilled” beats “baseline”: +7.7 points, standard deviation 1.5")
