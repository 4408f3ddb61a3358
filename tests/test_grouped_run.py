"""A run whose tables have a column of groups, from the start of the head to the model card."""

import json

import pandas as pd
import pytest
from small_runs import TINY

import compare_backbones
import find_label_errors
import test
import train
from configs import Configs
from finetune.core.options import UserError
from finetune.loading.batches import Shares
from finetune.training.probe import initialize_head
from finetune.training.training import get_images

SMALL = {**TINY, "image_target_size": (32, 32, 3), "use_imagenet_weights": False, "show_model_summary": False}


@pytest.fixture(scope="module")
def tables(photo_folder, tmp_path_factory):
    """Tables of 36 photos in pairs, at two sites; the paths, and the folder they are in."""
    folder = tmp_path_factory.mktemp("grouped")
    rows = [(str(path), path.parent.name) for path in sorted(photo_folder.glob("*/*.jpg"))]
    table = pd.DataFrame(rows, columns=["path", "class"])
    table["group"] = [f" pair {row // 2}" for row in table.index]
    table["site"] = ["north" if row % 4 < 2 else "south" for row in table.index]
    pairs = table.index // 2
    for name, places in {"training": (0, 1, 2), "validation": (3,), "testing": (4, 5)}.items():
        table[(pairs % 6).isin(places)].to_csv(folder / f"{name}.csv", index=False)
    return folder


def configs_of(tables, **options):
    paths = {"train_csv": "training.csv", "validation_csv": "validation.csv", "test_csv": "testing.csv"}
    facts = {name: str(tables / file) for name, file in paths.items()}
    return Configs(**(SMALL | facts | {"save_model_path": str(tables / "run"), "batch_size": 4} | options))


@pytest.mark.slow
def test_every_script_prints_the_number_of_groups(tables, capsys, monkeypatch):
    given = []

    def initialize(*facts):
        given.append(facts[-1])
        return initialize_head(*facts)

    monkeypatch.setattr("finetune.training.feature_store.initialize_head", initialize)
    options = {"head_initialization": "linear_probe", "model_selection": "interpolate", "num_epochs": 1}
    train.main(configs_of(tables, **options).validate())
    shown = capsys.readouterr().out
    assert "a logistic regression on 18 images in 9 groups" in shown
    assert all(groups.tolist() == [row // 2 for row in range(18)] for groups in given)
    assert "in 3 groups" in shown

    results = test.main(configs_of(tables, report_by="site").validate())
    shown = capsys.readouterr().out
    assert "test set: 12 images in 6 groups of" in shown
    found = results["sets"]["test"]
    assert (found["images"], found["groups"]) == (12, 6)
    assert {name: row["groups"] for name, row in found["per_class"].items()} == {"blue": 2, "green": 2, "red": 2}
    sites = {site: (row["images"], row["groups"]) for site, row in found["by"]["values"].items()}
    assert sites == {"north": (6, 3), "south": (6, 3)}
    assert "test set by site" in shown
    run = tables / "run"
    assert json.loads((run / "evaluation" / "metrics.json").read_text()) == json.loads(json.dumps(results))
    page, card = (run / "evaluation" / "report.html").read_text(), (run / "MODEL_CARD.md").read_text()
    assert 'id="breakdown"' in page
    assert "on 12 test images in 6 groups" in card
    assert "6 groups" in page


def test_training_names_tables_that_share_groups(tables, tmp_path, capsys):
    path = str(tmp_path / "v.csv")
    pd.read_csv(tables / "validation.csv").assign(group="pair 0").to_csv(path, index=False)
    configs = configs_of(tables, validation_csv=path, classes=["blue", "green", "red"])
    get_images(configs, {configs.train_csv: set(), path: set()}, Shares())
    shown = capsys.readouterr().out
    assert f"6 of the 6 images of {path} belong to 1 group of {configs.train_csv}" in shown
    assert configs.test_csv not in shown


def test_a_missing_column_to_report_by_is_named(tables, trained_elsewhere):
    with pytest.raises(UserError, match=r"testing.csv .*camera.*path, class, group, site"):
        test.main(trained_elsewhere(report_by="camera"))


@pytest.fixture
def trained_elsewhere(tables, monkeypatch):
    """Configs of a run that does not exist: errors in them are found before it is loaded."""
    monkeypatch.setattr(
        "finetune.training.trained_model.find_trained_model", lambda configs: ("run/best_model.keras", configs)
    )
    monkeypatch.setattr("finetune.training.trained_model.check_test_images", lambda *facts: 0)
    return lambda **options: configs_of(tables, classes=["blue", "green", "red"], **options)


@pytest.mark.slow
def test_backbones_and_labels_are_compared_over_groups(tables, tmp_path, capsys):
    facts = {"write_path": str(tmp_path / "found.csv"), "image_cache_path": str(tmp_path / "cache")}
    compared = compare_backbones.CompareConfigs(
        **SMALL, **facts, train_csv=str(tables / "training.csv"), backbones=["MobileNet"]
    )
    ranking = compare_backbones.main(compared.validate())["ranking"]
    assert ranking[["images", "groups"]].to_numpy().tolist() == [[18, 9]]
    assert "Comparing on 18 of the 18 images of" in (shown := capsys.readouterr().out)
    assert "in 9 groups." in shown
    judged = find_label_errors.LabelErrorConfigs(**SMALL, **facts, csv_path=str(tables / "training.csv"))
    find_label_errors.main(judged.validate())
    assert "Of 18 labels in 9 groups, about" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["one", "class"])
def test_too_few_groups_are_refused_before_features_are_computed(tables, tmp_path, value):
    table = pd.read_csv(tables / "training.csv")
    table.assign(group=table["class"] if value == "class" else value).to_csv(tmp_path / "t.csv", index=False)
    facts = {"write_path": str(tmp_path / "found.csv"), "image_cache_path": str(tmp_path / "cache")}
    compared = compare_backbones.CompareConfigs(**SMALL, **facts, train_csv=str(tmp_path / "t.csv"))
    with pytest.raises(UserError, match=r"t.csv: expected a class with images in at least two groups"):
        compare_backbones.main(compared.validate())
    judged = find_label_errors.LabelErrorConfigs(**SMALL, **facts, csv_path=str(tmp_path / "t.csv"))
    with pytest.raises(UserError, match=r"t.csv: expected a class with images in at least two groups"):
        find_label_errors.main(judged.validate())
    assert not (tmp_path / "cache").exists()
