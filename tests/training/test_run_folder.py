"""Which model a path leads to, how its description is taken, and who may write into a run's folder."""

import json

import pytest
from tiny_models import write_table

from configs import Configs
from finetune.core.options import UserError
from finetune.models.description import describe_model
from finetune.training.run_folder import locked
from finetune.training.trained_model import find_trained_model, resolve_model_path

# The description of a model that no file gives.
NEEDED = {"image_target_size": (96, 80, 3), "resize_mode": "stretch", "multi_label_classification": False}


def write_configs(folder, **options):
    (folder / "configs.json").write_text(json.dumps(options), encoding="utf-8")


def test_a_folder_leads_to_its_best_model_or_else_the_latest(tmp_path, capsys):
    (tmp_path / "latest_model.keras").touch()
    assert resolve_model_path(str(tmp_path)) == str(tmp_path / "latest_model.keras")
    (tmp_path / "best_model.keras").touch()
    assert resolve_model_path(str(tmp_path)) == str(tmp_path / "best_model.keras")
    preferred = ("latest_model.keras", "best_model.keras")
    assert resolve_model_path(str(tmp_path), preferred) == str(tmp_path / "latest_model.keras")
    assert resolve_model_path(str(tmp_path / "best_model.keras")) == str(tmp_path / "best_model.keras")
    assert capsys.readouterr().out == ""
    asked = str(tmp_path / "best_model.hdf5")
    assert resolve_model_path(asked) == str(tmp_path / "best_model.keras")
    printed = capsys.readouterr().out
    assert asked in printed
    assert str(tmp_path / "best_model.keras") in printed


@pytest.mark.parametrize("name", ["", "missing", "missing.keras", "folder", "notes.txt"])
def test_a_path_without_a_model_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.keras").touch()
    with pytest.raises(UserError, match="no model"):
        resolve_model_path(name)


STORED = {
    "classes": ["owl", "cat"],
    "image_target_size": [96, 80, 3],
    "multi_label_classification": True,
    "visual_model_name": "VGG16",
    "final_layer_pooling": None,
    "classifier_layer_sizes": [],
    "pop_conv_layers": 2,
    "cnn_downscaling_factor": 1,
    "cnn_downscaling_filters": 32,
}


def test_a_model_is_described_by_the_configs_in_its_folder(tmp_path):
    path = str(tmp_path / "best_model.keras")
    assert describe_model(Configs(batch_size=4), path) == Configs(batch_size=4)
    write_configs(tmp_path, **STORED, batch_size=99, train_csv="other.csv", learning_rate=0.5)
    configs = describe_model(Configs(batch_size=4), path)
    expected = STORED | {"image_target_size": (96, 80, 3)}
    assert {name: getattr(configs, name) for name in expected} == expected
    assert (configs.batch_size, configs.train_csv, configs.learning_rate) == (4, "./data/training_set.csv", 0.001)
    flags = ["--image_target_size", "96", "80", "3", "--classes", "none", "--batch_size", "7"]
    configs = describe_model(Configs.from_command_line(arguments=flags), path)
    assert (configs.classes, configs.batch_size) == (["owl", "cat"], 7)
    (tmp_path / "configs.json").write_text('{"classes": ', encoding="utf-8")
    with pytest.raises(UserError, match=r"configs\.json is not valid JSON"):
        describe_model(Configs(), path)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        # The default, but given.
        (["--image_target_size", "224", "224", "3"], "image_target_size"),
        (["--classes", "cat", "owl"], "classes"),
        (["--multi_label_classification", "False"], "multi_label_classification"),
        (["--visual_model_name", "DenseNet121"], "visual_model_name"),
        (["--pop_conv_layers", "0"], "pop_conv_layers"),
        (["--final_layer_pooling", "max"], "final_layer_pooling"),
    ],
)
def test_a_given_option_that_contradicts_the_model_is_refused(tmp_path, flags, name):
    write_configs(tmp_path, **STORED)
    configs = Configs.from_command_line(arguments=flags)
    with pytest.raises(UserError, match=rf"^{name} is .*configs\.json.*Received: "):
        describe_model(configs, str(tmp_path / "best_model.keras"))


def test_a_given_none_that_contradicts_the_model_is_refused(tmp_path):
    write_configs(tmp_path, final_layer_pooling="avg")
    configs = Configs.from_command_line(arguments=["--final_layer_pooling", "none"])
    with pytest.raises(UserError, match="final_layer_pooling"):
        describe_model(configs, str(tmp_path / "best_model.keras"))


def test_long_lists_of_classes_are_shown_from_where_they_differ(tmp_path):
    names = [f"class {number:04d}" for number in range(1100)]
    write_configs(tmp_path, classes=names)
    given = [*names[:1050], "stray", *names[1051:]]
    configs = Configs.from_command_line(arguments=["--classes", *given])
    with pytest.raises(UserError, match=r"\['class 1050', 'class 1051'.*\['stray', 'class 1051'") as error:
        describe_model(configs, str(tmp_path / "best_model.keras"))
    assert len(str(error.value)) < 800
    assert str(error.value).count("item 1051 of 1100") == 2


def test_classes_of_a_model_without_configs_come_from_the_training_table_and_results_go_to_its_folder(tmp_path):
    (tmp_path / "best_model.keras").touch()
    train_csv = write_table(tmp_path, "path,class\na,owl\nb,cat\n")
    path, configs = find_trained_model(Configs(load_model_path=str(tmp_path), train_csv=train_csv).replace(**NEEDED))
    assert path == str(tmp_path / "best_model.keras")
    assert (configs.classes, configs.save_model_path) == (["cat", "owl"], str(tmp_path))
    assert find_trained_model(configs.replace(save_model_path="elsewhere"))[1].save_model_path == "elsewhere"


def test_a_folder_in_use_is_refused(tmp_path):
    with (
        locked(str(tmp_path / "run")),
        pytest.raises(UserError, match="Another process is training into"),
        locked(str(tmp_path / "run")),
    ):
        pass
