"""The benchmark of recipes: which photos train, choose and report, and the arithmetic of its tables."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import recipes
from finetune.options import UserError

FLOWERS = np.repeat(np.eye(5), 100, axis=0)
SEEDS = range(10)

# Two data sets, three recipes, two seeds; all that follows from them below is worked out by hand.
FIGURES = {
    "flowers": {
        "recommended": {"scores": [0.90, 0.86], "seconds": [40.0, 50.0]},
        "probe": {"scores": [0.88, 0.85], "seconds": [20.0, 22.0]},
        "default": {"scores": [0.80, 0.84], "seconds": [200.0, 250.0]},
    },
    "voc": {
        "recommended": {"scores": [0.75, 0.77], "seconds": [60.0, 60.0]},
        "probe": {"scores": [0.77, 0.76], "seconds": [30.0, 30.0]},
        "default": {"scores": [0.60, 0.60], "seconds": [100.0, 100.0]},
    },
}


@pytest.fixture(scope="module")
def several_labels() -> np.ndarray:
    """200 photos of six labels, from rare to common, at least one each."""
    rng = np.random.default_rng(3)
    truth = (rng.uniform(size=(200, 6)) < [0.04, 0.1, 0.1, 0.2, 0.3, 0.5]).astype(float)
    truth[truth.sum(axis=1) == 0, 5] = 1
    return truth


@pytest.mark.parametrize("name", ["flowers", "several_labels"])
def test_sets_cover_all_photos_once(name, several_labels):
    truth = FLOWERS if name == "flowers" else several_labels
    for seed in SEEDS:
        sets = recipes.split_photos(truth, seed)
        assert list(sets) == ["training", "validation", "test"]
        np.testing.assert_array_equal(np.sort(np.concatenate(list(sets.values()))), np.arange(len(truth)))
        assert [len(rows) for rows in sets.values()] == [len(truth) * share // 5 for share in (3, 1, 1)]


@pytest.mark.parametrize("name", ["flowers", "several_labels"])
def test_test_photos_of_no_seed_choose_in_any(name, several_labels):
    truth = FLOWERS if name == "flowers" else several_labels
    splits = [recipes.split_photos(truth, seed) for seed in SEEDS]
    choosing = set(np.concatenate([sets["validation"] for sets in splits]).tolist())
    reporting = set(np.concatenate([sets["test"] for sets in splits]).tolist())
    assert not choosing & reporting
    # Pools of two fifths each, not new ones for each seed.
    assert len(choosing) <= len(truth) * 2 // 5
    assert len(reporting) <= len(truth) * 2 // 5


def test_classes_of_equal_size_stay_so():
    for seed in SEEDS:
        counts = [FLOWERS[rows].sum(axis=0).tolist() for rows in recipes.split_photos(FLOWERS, seed).values()]
        assert counts == [[60] * 5, [20] * 5, [20] * 5]


def test_each_label_keeps_its_share(several_labels):
    for seed in SEEDS:
        sets = recipes.split_photos(several_labels, seed)
        for rows, share in zip(sets.values(), (0.6, 0.2, 0.2), strict=True):
            wanted = share * several_labels.sum(axis=0)
            # The rarest label is dealt out first, and so exactly, but for the rounding of two divisions.
            assert abs(several_labels[rows, 0].sum() - wanted[0]) <= 1.5
            assert (np.abs(several_labels[rows].sum(axis=0) - wanted) <= 0.2 * wanted + 2).all()


def test_a_split_follows_from_its_seed_alone():
    first, again, other = (recipes.split_photos(FLOWERS, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert all(not np.array_equal(first[name], other[name]) for name in first)


def test_the_photos_of_published_figures_stay_the_same():
    sets = recipes.split_photos(FLOWERS, 0)
    assert sets["validation"][:8].tolist() == [5, 6, 14, 18, 22, 28, 32, 40]
    assert sets["test"][:8].tolist() == [0, 1, 10, 11, 13, 27, 34, 35]


def test_deal_gives_the_rarest_label_to_each_part():
    truth = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [1, 0], [1, 0]], float)
    for seed in SEEDS:
        parts = recipes.deal(truth, np.arange(6), [3, 3], np.random.default_rng(seed))
        assert [truth[part].sum(axis=0).tolist() for part in parts] == [[3, 1], [3, 1]]


def test_folders_are_classes(photo_folder):
    photos = recipes.read_photos("photos", str(photo_folder))
    assert (photos.class_names, photos.multi_label) == (["blue", "green", "red"], False)
    np.testing.assert_array_equal(photos.truth, np.repeat(np.eye(3), 12, axis=0))
    assert photos.paths[0] == str(photo_folder / "blue" / "00.jpg")


def test_a_table_has_several_labels(multilabel_csv):
    photos = recipes.read_photos("photos", f"{multilabel_csv}:{multilabel_csv.parent}")
    assert (photos.class_names, photos.multi_label) == (["blue", "green", "red"], True)
    # Its photos are of colours (0, 0), (1, 0), (2, 0), (0, 1), ...
    np.testing.assert_array_equal(photos.truth[:4], [[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 0]])
    assert photos.paths[3] == str(multilabel_csv.parent / "03.jpg")


def test_no_photos_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="one folder per class"):
        recipes.read_photos("photos", str(tmp_path))


def test_tables_hold_the_sets(multilabel_csv, tmp_path):
    photos = recipes.read_photos("photos", f"{multilabel_csv}:{multilabel_csv.parent}")
    tables = {name: pd.read_csv(path) for name, path in recipes.write_tables(photos, 1, str(tmp_path)).items()}
    labels = dict(pd.read_csv(multilabel_csv).itertuples(index=False))
    for name, rows in recipes.split_photos(photos.truth, 1).items():
        assert tables[name]["path"].tolist() == photos.paths[rows].tolist()
        names = tables[name]["path"].str.rpartition("/")[2]
        assert tables[name]["class"].tolist() == [labels[photo] for photo in names]


def test_scores_are_means_and_ranges():
    table = recipes.format_scores(FIGURES, {"flowers": "accuracy", "voc": "mean_average_precision"}).splitlines()
    assert table[0] == "| recipe | flowers, accuracy | flowers, s | voc, mean average precision | voc, s |"
    assert table[2] == "| recommended | 0.880 [0.860, 0.900] | 45 [40, 50] | 0.760 [0.750, 0.770] | 60 [60, 60] |"
    assert len(table) == 5


def test_differences_are_paired():
    assert recipes.format_differences(FIGURES, "probe").splitlines()[2:] == [
        # 0.90 - 0.88 and 0.86 - 0.85; 0.75 - 0.77 and 0.77 - 0.76.
        "| recommended | +1.5 [+1.0, +2.0] | -0.5 [-2.0, +1.0] |",
        "| default | -4.5 [-8.0, -1.0] | -16.5 [-17.0, -16.0] |",
    ]


def test_recipes_are_compared_photo_by_photo():
    photos = {"recommended": [[1, 1, 1, 0], [1, 1]], "probe": [[1, 0, 1, 0], [1, 0]]}
    figures = {"flowers": {name: {"photos": scores} for name, scores in photos.items()}}
    # Two of six photos are gained: a third, with a standard error of the root of (6 * 2/9 / 5 / 6).
    error = 196 * (2 / 9 / 5) ** 0.5
    expected = f"| probe | +33.3 ({100 / 3 - error:+.1f} to {100 / 3 + error:+.1f}) |"
    assert recipes.format_paired(figures, "recommended").splitlines()[2:] == [expected]


def test_runs_go_on_where_they_were_stopped(multilabel_csv, tmp_path, monkeypatch, capsys):
    place = f"{multilabel_csv}:{multilabel_csv.parent}"
    monkeypatch.setattr(
        "sys.argv", ["recipes.py", "--data", f"photos={place}", "--recipes", "probe", "--seeds", "0", "1"]
    )
    monkeypatch.setattr(recipes, "RUNS_FILE", tmp_path / "runs.json")
    arguments, calls = recipes.parse_arguments(), []

    def run(recipe, photos, seed, folder, arguments):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return recipes.Run(0.5 + seed, 10.0, [1.0, 0.0])

    monkeypatch.setattr(recipes, "run_train", run)
    data = [recipes.read_photos("photos", place)]
    with pytest.raises(KeyboardInterrupt):
        recipes.run_all(data, arguments)
    assert recipes.run_all(data, arguments)["photos"]["probe"] == {
        "scores": [0.5, 1.5],
        "seconds": [10.0, 10.0],
        "photos": [[1.0, 0.0], [1.0, 0.0]],
    }
    assert calls == [0, 1, 1]
    arguments.budget = 7
    recipes.run_all(data, arguments)
    assert calls == [0, 1, 1, 0, 1]


def test_targets_come_from_means():
    measured = {what: value for what, value, _, _ in recipes.list_targets(FIGURES)}
    assert measured == pytest.approx(
        {
            "flowers: points above the probe": 1.5,
            # 0.12 of 0.18; 45 of 225 seconds.
            "flowers: error / the default's": 2 / 3,
            "flowers: seconds / the default's": 0.2,
            "voc: points above the probe": -0.5,
            "voc: error / the default's": 0.6,
            "voc: seconds / the default's": 0.6,
            "points above the probe, the lowest of the data sets": -0.5,
        }
    )


def test_targets_tell_what_is_missed():
    targets = [("gain", 0.9, "at least", 1), ("time", 0.5, "at most", 0.5)]
    assert recipes.format_targets(targets).splitlines()[2:] == [
        "| gain | 0.9 | at least 1 | missed |",
        "| time | 0.5 | at most 0.5 | holds |",
    ]


@pytest.mark.parametrize("text", ["flowers", "=folder", "flowers="])
def test_data_needs_a_name_and_a_place(text, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipes.py", "--data", text])
    with pytest.raises(SystemExit, match="2"):
        recipes.parse_arguments()
    assert "expected NAME=FOLDER" in capsys.readouterr().err


STOPPING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
time.sleep(600)
"""


@pytest.mark.parametrize(("program", "budget"), [("pass", None), (STOPPING, 1.5)])
def test_a_script_may_end_or_stop_at_the_budget(program, budget, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(program)
    assert recipes.run_script([script], budget) > 0


@pytest.mark.parametrize(
    ("program", "budget", "message"),
    [
        ("print('What was wrong.'); raise SystemExit(2)", None, "status 2:\nWhat was wrong."),
        # Another one's signal.
        ("raise SystemExit(143)", 600, "status 143"),
        ("import time; time.sleep(600)", 0.1, "had not begun to train after 0 s"),
    ],
)
def test_a_script_that_leaves_nothing_is_told(program, budget, message, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(program)
    with pytest.raises(UserError, match=message):
        recipes.run_script([script], budget)
