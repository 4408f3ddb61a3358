"""The metrics of each value of a column, compared with those of its images alone."""

import numpy as np
import pandas as pd
import pytest
from random_answers import NAMES, random_multilabel, random_single_label
from sklearn import metrics as sk

from finetune.core.options import UserError
from finetune.data.groups import pick_groups
from finetune.evaluation.breakdown import evaluate_by, format_breakdown
from finetune.evaluation.decision import Decision
from finetune.evaluation.evaluation import check_report_by
from finetune.evaluation.intervals import get_intervals


def make_sites(number):
    return pd.Series(np.where(np.arange(number) % 3 == 0, " north", ["south", ""] * (number // 2)), name="site")


def test_each_site_has_the_metrics_and_intervals_of_its_own_images():
    y_true, raw = random_single_label(120, 3)
    decision, groups, sites = Decision(NAMES, False), np.arange(120) // 6, make_sites(120)
    found = evaluate_by(sites, y_true, raw, decision, 5, groups)
    assert found["column"] == "site"
    assert list(found["values"]) == ["", "north", "south"]
    assert sum(row["images"] for row in found["values"].values()) == 120
    for value, row in found["values"].items():
        rows = np.flatnonzero(sites.str.strip() == value)
        predicted = raw[rows].argmax(axis=1)
        assert row["accuracy"] == pytest.approx(sk.accuracy_score(y_true[rows], predicted))
        assert row["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y_true[rows], predicted))
        assert row["groups"] == len(np.unique(groups[rows]))
        expected = get_intervals(y_true[rows], raw[rows], decision, 5, groups=pick_groups(groups, rows))
        assert row["intervals"] == {name: expected[name] for name in ("accuracy", "balanced_accuracy")}


def test_each_site_has_its_multilabel_metrics():
    y_true, raw = random_multilabel(60)
    decision = Decision(NAMES, True, exact_match_threshold=0.45)
    found = evaluate_by(make_sites(60), y_true, raw, decision, 0, None)["values"]
    rows = np.flatnonzero(np.arange(60) % 3 == 0)
    assert found["north"]["exact_match_accuracy"] == pytest.approx(
        ((raw[rows] >= 0.45) == y_true[rows]).all(axis=1).mean()
    )
    expected = sk.average_precision_score(y_true[rows], raw[rows])
    assert found["north"]["mean_average_precision"] == pytest.approx(expected)
    assert "groups" not in found["north"]


def test_a_site_of_one_class_or_one_group_has_a_line_too():
    y_true, raw = random_single_label(40, 3)
    y_true[:10] = 1
    sites = pd.Series(["one class"] * 10 + ["other"] * 30, name="site")
    found = evaluate_by(sites, y_true, raw, Decision(NAMES, False), 0, np.repeat([0, 1, 2], [10, 15, 15]))
    assert found["values"]["one class"]["groups"] == 1
    assert found["values"]["one class"]["intervals"] == {"accuracy": None, "balanced_accuracy": None}
    lines = format_breakdown(found).splitlines()
    assert lines[1].split() == ["site", "images", "groups", "accuracy", "balanced", "accuracy"]
    assert lines[2].split()[:4] == ["one", "class", "10", "1"]
    assert lines[3].split()[:3] == ["other", "30", "2"]
    assert len(lines) == 4


def test_of_many_sites_the_worst_are_shown():
    row = {"images": 9, "balanced_accuracy": 0.5, "intervals": {"accuracy": [0, 1], "balanced_accuracy": [0, 1]}}
    values = {f"site {number}": row | {"accuracy": (number * 37 % 200) / 200} for number in range(200)}
    lines = format_breakdown({"column": "site", "values": values}).splitlines()
    assert "20 worst of 200" in lines[0]
    assert [float(line.split()[3]) for line in lines[2:]] == [number / 200 for number in range(20)]


def test_a_column_that_is_not_there_or_names_each_image_is_refused():
    table = pd.DataFrame({"path": [f"{row}.jpg" for row in range(1001)], "class": "a", "site": "x"})
    check_report_by(table, "", "t.csv")
    check_report_by(table, "site", "t.csv")
    with pytest.raises(UserError, match=r"t.csv .*'camera'.* path, class, site\. Set report_by"):
        check_report_by(table, "camera", "t.csv")
    with pytest.raises(UserError, match="report_by .* 1001 in the column 'path'"):
        check_report_by(table, "path", "t.csv")
