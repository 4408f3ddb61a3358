"""The model card has the content of a run's files, in Hugging Face's format, with any names."""

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from evaluations import multi_label, single_label, with_answers
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from sklearn.metrics import accuracy_score, f1_score
from small_runs import options_of, tables  # noqa: F401

import compress_weights
import test
import train
from configs import Configs
from finetune.core.options import UserError
from finetune.core.texts import show
from finetune.evaluation.abstention import Abstention
from finetune.reporting.model_card import write_model_card
from finetune.training.run import Images, Run
from finetune.training.run_folder import LOCK_FILE, clear_folder
from finetune.training.trainer import Interruption
from finetune.training.training import open_run
from finetune.training.workers import Team

HOSTILE = [
    "a|b`c",
    "- x: #y",
    "<img src=x onerror=alert(1)>",
    "\"'---\n---\u202e",
    "[l](http://x) *b* _i_ ~~s~~ &lt; \\",
]
STATS = {"epochs_completed": 7, "monitor": "val_accuracy", "best": 0.901, "best_epoch": 2}
LOG = "epoch,accuracy,loss,val_accuracy,learning_rate\n1,0.5,1.1,0.4,0.001\n2,0.75,0.9,0.901,0.001\n"


def make_data(counts):
    sets = {"training": counts, "validation": [1] * len(counts)}
    names = ["cat", "dog", "owl"]
    return {
        name: {
            "csv": f"/home/alice/{name}.csv",
            "images": sum(values),
            "classes": dict(zip(names, values, strict=True)),
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
        }
        for name, values in sets.items()
    }


def make_artefact(kind, precision, name, rejected=False, comparison=True):
    """Returns an artefact of 3 MB in two files, 2 points worse on 50 images, or one that was not compared."""
    found = {
        "images": 50,
        "largest_difference": 0.0321,
        "mean_difference": 0.004,
        "changed_predictions": 3,
        "measure": "accuracy",
        "accuracy": {"before": 0.88, "after": 0.86},
        "accuracy_drop": 2.0,
        "images_per_second": {"before": 20.0, "after": 41.26},
    }
    path = f"/home/alice/runs/{name}"
    return {
        "kind": kind,
        "precision": precision,
        "path": path,
        "files": {path: 2_500_000, f"{path}.json": 500_000},
        "rejected": rejected,
        "comparison": found if comparison else None,
    }


def make_compression(folder, artefacts, model=b"model"):
    """Writes a model file and the artefacts that are not rejected; returns the report of them."""
    (folder / "best_model.keras").write_bytes(b"model")
    for artefact in artefacts:
        if not artefact["rejected"]:
            (folder / os.path.basename(artefact["path"])).write_bytes(b"")
    return {
        "model": "/home/alice/runs/best_model.keras",
        "model_bytes": 12_340_000,
        "model_sha256": hashlib.sha256(model).hexdigest(),
        "test_csv": None,
        "images": 50,
        "tolerance": 1.5,
        "artefacts": artefacts,
    }


def write_run(folder, results=None, files=(), **options):
    """Writes the files of a run: `results` with their decision, and other files by name."""
    values = {"classes": ["cat", "dog", "owl"], "validation_csv": "validation.csv"}
    contents = {"configs.json": Configs(**(values | options)).to_dict(), **dict(files)}
    if results:
        contents |= {"decision.json": results["decision"], "evaluation/metrics.json": results}
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


class Tables(HTMLParser):
    """The tags of a rendered card, its text by the heading before it, and its tables as rows of cells."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts, self.tables, self.heading, self.level = [], {}, [], "", None
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(source))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.level = tag

    def handle_endtag(self, tag):
        self.level = None if tag in ("h2", "td", "th") else self.level

    def handle_data(self, text):
        if self.level == "h2":
            self.heading += text
        elif self.level in ("td", "th"):
            self.tables[-1][-1][-1] += text
        self.texts[self.heading] = self.texts.get(self.heading, "") + text


def read_card(folder):
    """Writes the card; returns the metadata as Hugging Face reads it, and the rendered text."""
    path = write_model_card(str(folder))
    assert path == str(folder / "MODEL_CARD.md")
    with open(path, encoding="utf-8") as file:
        card = ModelCard(file.read())
    return card.data, Tables(card.text)


def find_table(tables, *headings):
    """Returns the rows of the table whose first headings are these, by their first cell."""
    (table,) = [rows for rows in tables.tables if tuple(rows[0][: len(headings)]) == headings]
    assert {len(row) for row in table} == {len(table[0])}
    return {row[0]: [cell.replace("\u00a0", " ") for cell in row[1:]] for row in table[1:]}


# Metadata


@pytest.mark.parametrize(
    ("results", "changes", "expected"),
    [
        (single_label(), {}, {"accuracy": 0.875, "f1": 0.545}),
        (multi_label(), {}, {"accuracy": 0.55, "f1": 0.46, "roc_auc": 0.91}),
        # A small metric is a number, and an undefined one is left out.
        (multi_label(), {"exact_match_accuracy": 2e-05, "macro_f1": None}, {"accuracy": 2e-05, "roc_auc": 0.91}),
        (None, {}, None),
    ],
)
def test_metadata_is_hugging_faces(tmp_path, results, changes, expected):
    if results:
        results["sets"]["test"] |= changes
    write_run(tmp_path, results, visual_model_name="MobileNet", multi_label_classification=results == multi_label())
    data, _ = read_card(tmp_path)
    assert (data.library_name, data.pipeline_tag, data.license) == ("keras", "image-classification", None)
    assert data.tags == ["keras", "tensorflow", "MobileNet"]
    assert data.metrics == (expected and [*expected])
    assert (data.eval_results and {one.metric_type: one.metric_value for one in data.eval_results}) == expected


# Sections


def test_metrics_have_intervals_and_images_are_counted_by_set(tmp_path):
    write_run(tmp_path, single_label(), {"data.json": make_data([20, 8, 4])})
    _, card = read_card(tmp_path)
    metrics = find_table(card, "Metric", "Test", "95 % interval", "Validation", "Training")
    assert metrics["Accuracy"][:4] == ["87.5 %", "75.0 % to 100.0 %", "90.1 %", "99.9 %"]
    assert find_table(card, "Class on the test set")["dog"] == ["0.500", "1.000", "0.667", "1"]
    assert "1.500, fitted on the validation set" in card.texts["Decision"]
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("training", "validation")}
    assert find_table(card, "Set", "Table", "Images") == {
        "Training": ["training.csv", "32", digests["training"]],
        "Validation": ["validation.csv", "3", digests["validation"]],
    }
    counts = find_table(card, "Class", "Training", "Validation", "Test")
    assert counts == {"cat": ["20", "1", "12"], "dog": ["8", "1", "1"], "owl": ["4", "1", "3"]}


def test_several_labels_have_thresholds_and_intervals(tmp_path):
    write_run(tmp_path, multi_label(), multi_label_classification=True, validation_csv="")
    _, card = read_card(tmp_path)
    row = find_table(card, "Class on the test set", "Precision")["cat"]
    assert (row[0], row[-2:]) == ("0.800 (0.700 to 0.900)", ["0.370", "0.700"])
    assert find_table(card, "Class on the test set")["owl"][4] == "undefined"
    assert "1.000, not fitted" in card.texts["Decision"]
    assert "cat 0.370, dog 0.370, owl 0.370." in card.texts["Decision"]
    assert "owl" in card.texts["Limits"]


def test_a_promise_is_shown_with_what_was_measured_and_what_it_does_not_cover(tmp_path):
    rule = Abstention(0.05, [0.8], 0.01, -1.0, [0.0, 1.0, 0.0, 1.0], 200)
    write_run(tmp_path, with_answers(single_label(), rule))
    _, card = read_card(tmp_path)
    text = card.texts["Decision"].replace("\u00a0", " ")
    for words in ("at most 5.0 %", "50.0 % of the images are answered", "12.5 % (0.3 % to 52.7 %)", "another camera"):
        assert words in text
    assert "the model file alone predicts one of the classes" in card.texts["Limits"]
    write_run(tmp_path, with_answers(single_label(), None))
    _, card = read_card(tmp_path)
    assert "promise" not in card.texts["Decision"]
    assert "the model predicts one of the classes" in card.texts["Limits"]


def test_recipe_lists_the_options_and_the_progress(tmp_path):
    options = {"head_epochs": 2, "conv_layers_to_train": 3, "optimizer_type": "AdamW", "weight_decay": 0.01}
    files = {".training_stats.json": STATS, "training_log.csv": LOG}
    write_run(tmp_path, None, files, num_epochs=20, warmup_epochs=1.5, mixup_alpha=0.2, random_seed=5, **options)
    _, card = read_card(tmp_path)
    recipe = {name: cells[0] for name, cells in find_table(card, "Part", "Options").items()}
    for name, words in {
        "Start": "DenseNet121 with ImageNet weights",
        "Trained": "last 3 convolutions",
        "Optimizer": "AdamW; learning rate 0.001; weight decay 0.01",
        "Schedule": "plateau; warmup epochs 1.5",
        "Augmentation": "default; mixup alpha 0.2",
        "Epochs": "7 of 20",
        "Best epoch": "2: val_accuracy 0.9010",
        "Its metrics": "accuracy 0.7500; loss 0.9000; val_accuracy 0.9010",
    }.items():
        assert words in recipe[name]
    options = find_table(card, "Option", "Value", "Default")
    assert options["num_epochs"] == ["20", "100"]
    assert "learning_rate" not in options


@pytest.mark.parametrize(
    ("load_model_path", "start", "is_own"),
    [
        ("", "logistic regression", False),
        ("runs/this/latest_model.keras", "logistic regression", True),
        ("runs/other/best_model.keras", "the model best_model.keras", False),
    ],
)
def test_command_repeats_the_run_from_its_start_in_another_folder(tmp_path, load_model_path, start, is_own):
    write_run(
        tmp_path, save_model_path="runs/this/", load_model_path=load_model_path, head_initialization="linear_probe"
    )
    _, card = read_card(tmp_path)
    assert start in find_table(card, "Part", "Options")["Start"][0]
    (command,) = re.findall(r"python train.py (.*)", card.texts["Recipe"])
    words = shlex.split(command.replace("configs.json", f"{tmp_path}/configs.json"))
    given = Configs.from_command_line(arguments=words)
    assert given.save_model_path != "runs/this/"
    assert given.load_model_path == ("" if is_own else load_model_path)
    assert given.head_initialization == "linear_probe"


def test_each_artefact_has_its_sizes_speeds_and_how_to_load_it(tmp_path):
    artefacts = [
        make_artefact("weights", "int8", "best_model_compressed.h5"),
        make_artefact("tflite", "int8", "best_model_int8.rejected.tflite", rejected=True),
        make_artefact("onnx", "float32", "best_model.onnx", comparison=False),
        make_artefact("saved_model", "float32", "best_model_saved_model"),
    ]
    compression = make_compression(tmp_path, artefacts)
    (tmp_path / "best_model_saved_model").unlink()
    write_run(tmp_path, None, {"compression_report.json": compression})
    _, card = read_card(tmp_path)
    files = find_table(card, "File", "Holds", "MB", "Accuracy")
    assert files["best_model.keras"][1] == "12.34"
    assert files["best_model_compressed.h5"] == [
        *("weights, int8", "3.00", "88.0 % → 86.0 %", "0.032", "3 of 50", "20.0 → 41.3", "accepted")
    ]
    assert files["best_model_int8.rejected.tflite"][-1] == "rejected"
    assert files["best_model.onnx"] == ["onnx, float32", "3.00", "", "", "", "", "not compared"]
    loading = card.texts["How to load it"]
    assert all(words in loading for words in ("keras.models", "custom_load_model(", "onnxruntime"))
    # One is rejected, and the other no longer exists.
    assert not any(words in loading for words in ("tflite", "saved_model"))


def test_snippets_of_all_runtimes_are_python(tmp_path):
    names = {"weights": "m_compressed.h5", "tflite": "m.tflite", "onnx": "m.onnx", "saved_model": "m_saved_model"}
    artefacts = [make_artefact(kind, "float32", f'"{name}') for kind, name in names.items()]
    write_run(tmp_path, None, {"compression_report.json": make_compression(tmp_path, artefacts)})
    write_model_card(str(tmp_path))
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "MODEL_CARD.md").read_text(), re.DOTALL)
    constants = [constant for block in blocks for constant in compile(block, "card", "exec").co_consts]
    assert {'"m_compressed', '"m.tflite', '"m.onnx', '"m_saved_model'} <= set(constants)


# Limits


def test_limits_depend_on_the_results(tmp_path):
    results = single_label()
    write_run(tmp_path, results, {"data.json": make_data([24, 8, 8])})
    limits = read_card(tmp_path)[1].texts["Limits"]
    assert all(words in limits for words in ("dog, owl.", "25.0 points", "24 training images of cat, 8 of dog"))
    assert not any(words in limits for words in ("optimistic", "No prediction was wrong"))
    results["sets"]["test"] |= {"images": 600, "accuracy": 1.0, "intervals": {"accuracy": [1.0, 1.0]}}
    for row in results["sets"]["test"]["per_class"].values():
        row["support"] = 200
    write_run(tmp_path, results, {"data.json": make_data([23, 8, 8])})
    limits = read_card(tmp_path)[1].texts["Limits"]
    # Three in 600.
    assert all(words in limits for words in ("600 test images", "up to 0.5 %"))
    assert not any(words in limits for words in ("imprecise", "95 % interval", "imbalanced"))


@pytest.mark.parametrize(
    ("fields", "validation_csv", "is_noted"),
    [
        ({}, "", True),
        ({"sha256": hashlib.sha256(b"validation").hexdigest()}, "test.csv", True),
        ({"selected_the_model": False}, "", False),
    ],
)
def test_test_set_that_selected_the_model_is_noted(tmp_path, fields, validation_csv, is_noted):
    results = single_label()
    results["sets"]["test"] |= fields
    write_run(tmp_path, results, {"data.json": make_data([9, 9, 9])}, validation_csv=validation_csv)
    _, card = read_card(tmp_path)
    for section in ("Results", "Limits"):
        assert ("selected on the test set" in card.texts[section]) is is_noted


# Missing parts, damaged parts and parts of another model


def test_missing_parts_name_the_script_to_run(tmp_path):
    write_run(tmp_path, validation_csv="")
    _, card = read_card(tmp_path)
    scripts = {"Results": "test.py", "Decision": "test.py", "Data": "train.py"}
    for section, script in (scripts | {"Files, sizes and speeds": "compress_weights.py"}).items():
        assert script in card.texts[section]


def test_without_configs_there_is_no_card_and_damaged_ones_are_an_error(tmp_path):
    assert write_model_card(str(tmp_path)) == ""
    (tmp_path / "configs.json").write_text("{")
    with pytest.raises(UserError, match=r"configs.json"):
        write_model_card(str(tmp_path))
    assert os.listdir(tmp_path) == ["configs.json"]


def test_parts_of_an_earlier_model_and_a_damaged_log_are_left_out(tmp_path, capsys):
    artefacts = [make_artefact("onnx", "float32", "best_model.onnx")]
    files = {"compression_report.json": make_compression(tmp_path, artefacts, model=b"the model before")}
    write_run(tmp_path, single_label(), files | {".training_stats.json": STATS, "training_log.csv": "nothing"})
    (tmp_path / "decision.json").unlink()
    data, card = read_card(tmp_path)
    assert data.eval_results is None
    assert "Not tested yet" in card.texts["Results"]
    assert "Not compressed yet" in card.texts["Files, sizes and speeds"]
    assert "onnx" not in card.texts["How to load it"]
    assert "Best epoch" in find_table(card, "Part")
    assert "training_log.csv" in capsys.readouterr().out


PARTS = ["data.json", ".training_stats.json", "decision.json", "evaluation/metrics.json", "compression_report.json"]


DAMAGES = ["", "{", "[]", "null", "[" * 100_000, "\udcff"]


@pytest.mark.parametrize(
    ("name", "damage"), [*((name, '{"model": "m"}') for name in PARTS), *zip(PARTS + PARTS[:1], DAMAGES, strict=True)]
)
def test_damaged_part_is_left_out_and_named(tmp_path, capsys, name, damage):
    files = {"data.json": make_data([9, 9, 9]), ".training_stats.json": STATS}
    files["compression_report.json"] = make_compression(tmp_path, [make_artefact("onnx", "float32", "best_model.onnx")])
    write_run(tmp_path, single_label(), files)
    (tmp_path / name).write_bytes(damage.encode("utf-8", "surrogateescape"))
    read_card(tmp_path)
    printed = capsys.readouterr().out
    assert re.findall("leaves out (.*?):", printed) == [str(tmp_path / name)]


def list_values(content, path=()):
    """Yields the path of every member of JSON content."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from list_values(value, (*path, key))


@pytest.mark.parametrize("name", PARTS)
def test_no_wrong_value_of_a_part_makes_an_error(tmp_path, name):
    results = multi_label()
    del results["sets"]["training"]
    parts = {"data.json": make_data([9, 9, 9]), ".training_stats.json": STATS, "decision.json": results["decision"]}
    parts |= {"compression_report.json": make_compression(tmp_path, [make_artefact("onnx", "float32", "m.onnx")])}
    parts |= {"evaluation/metrics.json": results, "training_log.csv": LOG}
    write_run(tmp_path, results, parts, multi_label_classification=True)
    whole = (tmp_path / name).read_text()
    # Five values, so that the columns of equal rows get different ones.
    wrong = itertools.cycle([None, "a", [], float("nan"), {}])
    for path in list_values(json.loads(whole)):
        content = part = json.loads(whole)
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = next(wrong)
        (tmp_path / name).write_text(json.dumps(content))
        write_model_card(str(tmp_path))


# Names and paths


@pytest.mark.parametrize("results", [single_label(HOSTILE[:3]), multi_label(HOSTILE[2:])])
def test_hostile_names_are_shown_as_they_are(tmp_path, results):
    names = results["classes"]
    data = make_data([3, 9, 3])
    for part in data.values():
        part["classes"] = dict(zip(names, part["classes"].values(), strict=True))
        part["csv"] = part["sha256"] = names[0].replace("/", "")
    options = {"csv_label_column": names[1], "image_directory": names[2].replace("/", "")}
    write_run(
        tmp_path,
        results,
        {"data.json": data},
        classes=names,
        multi_label_classification="threshold" in results["sets"]["test"],
        **options,
    )
    stored = json.loads((tmp_path / "configs.json").read_text())
    stored["visual_model_name"] = 'x"\n---\n<b>: \x07\u202e花\U0001f600'
    (tmp_path / "configs.json").write_text(json.dumps(stored))
    data, card = read_card(tmp_path)
    assert data.tags[-1] == stored["visual_model_name"]
    assert data.model_name == f"{stored['visual_model_name']} image classifier"
    assert not set(card.tags) & {"img", "b", "a", "em", "strong", "s"} - {"a"}
    assert card.tags.count("a") == 1
    shown = [show(name) for name in names]
    assert list(find_table(card, "Class on the test set")) == shown
    assert f": {', '.join(shown)}." in card.texts[""]
    assert find_table(card, "Option")["csv_label_column"][0] == shown[1]
    assert find_table(card, "Set")["Training"][0] == show(names[0].replace("/", ""))


def test_no_folder_of_the_computer_is_shown(tmp_path):
    results = single_label()
    results["model"] = "/home/alice/runs/best_model.keras"
    paths = {"train_csv": "/home/alice/cats.csv", "image_directory": "s3://alice:secret@bucket/photos/"}
    paths |= {"validation_csv": r"C:\Users\alice\dogs.csv", "load_model_path": "/home/alice/other/latest_model.keras"}
    paths |= {"save_model_path": "/home/alice/runs/last", "image_cache_path": "../alice/cache"}
    compression = make_compression(tmp_path, [make_artefact("onnx", "float32", "best_model.onnx")])
    files = {"data.json": make_data([9, 9, 9]), "compression_report.json": compression, ".training_stats.json": STATS}
    write_run(tmp_path, results, files, **paths)
    _, card = read_card(tmp_path)
    text = (tmp_path / "MODEL_CARD.md").read_text()
    for words in ("alice", "home", "Users", "secret", "bucket", str(tmp_path)):
        assert words not in text
    options = find_table(card, "Option")
    assert options["validation_csv"][0] == "dogs.csv"
    assert options["image_directory"][0] == "photos"
    assert options["save_model_path"][0] == "last"


# A run


@pytest.fixture(scope="module")
def trained(tables, tmp_path_factory):
    """A run of one epoch, tested and compressed; its configs, and its card before the test."""
    run = tmp_path_factory.mktemp("card") / "run"
    configs = Configs(**options_of(tables, run, num_epochs=1, deterministic=False))
    train.main(configs)
    untested = (run / "MODEL_CARD.md").read_text()
    test.main(configs)
    compress_weights.main(compress_weights.CompressConfigs(model_path=str(run)))
    return run, configs, untested


def digest(labels, paths):
    """Returns the SHA-256 of the labels' bytes and of file names, each followed by a zero byte."""
    names = b"".join(os.path.basename(path).encode() + b"\0" for path in paths)
    return hashlib.sha256(np.asarray(labels).tobytes() + names).hexdigest()


@pytest.mark.slow
def test_card_of_a_run_has_its_data_and_the_metrics_of_its_predictions(trained):
    run, configs, untested = trained
    stored = json.loads((run / "data.json").read_text())
    for name, csv_path in {"training": configs.train_csv, "validation": configs.test_csv}.items():
        table = pd.read_csv(csv_path)
        labels = table["class"].map({"blue": 0, "green": 1, "red": 2}).to_numpy(np.int32)
        assert stored[name] == {
            "csv": csv_path,
            "csv_sha256": hashlib.sha256(Path(csv_path).read_bytes()).hexdigest(),
            "images": len(labels),
            "classes": table["class"].value_counts().to_dict(),
            "sha256": digest(labels, table["path"]),
        }
    assert "Not tested yet" in untested
    assert ModelCard(untested).data.eval_results is None
    data, card = read_card(run)
    predictions = pd.read_csv(run / "evaluation" / "predictions.csv")
    found = {one.metric_type: one.metric_value for one in data.eval_results}
    truth, predicted = predictions["true"], predictions["predicted"]
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(truth, predicted, average="macro"), abs=1e-6)
    assert find_table(card, "Class", "Training", "Validation", "Test")["blue"] == ["9", "3", "3"]
    assert find_table(card, "File")["best_model_compressed.h5"][0] == "weights, float32"
    assert str(run.parent) not in (run / "MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_snippets_of_the_card_load_the_models(trained, monkeypatch):
    run, configs, _ = trained
    write_model_card(str(run))
    blocks = re.findall(r"```python\n(.*?)```", (run / "MODEL_CARD.md").read_text(), re.DOTALL)
    shutil.copy(pd.read_csv(configs.test_csv)["path"][0], run / "photo.jpg")
    monkeypatch.chdir(run)
    answers = []
    for block in blocks[1:]:
        names = {}
        exec(blocks[0] + block, names)
        answers.append(names["probabilities"])
    assert len(answers) == 2
    np.testing.assert_allclose(answers[0].sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5)


@pytest.mark.slow
def test_resumed_run_gets_a_new_card(trained):
    run, configs, _ = trained
    before = json.loads((run / "data.json").read_text())
    train.main(configs.replace(load_model_path=str(run), num_epochs=2))
    data, card = read_card(run)
    assert data.eval_results is None
    assert find_table(card, "Part")["Epochs"] == ["2 of 2"]
    # The command starts from the beginning.
    assert "--load_model_path" not in card.texts["Recipe"]
    assert json.loads((run / "data.json").read_text()) == before


def test_resuming_writes_data_json_and_removes_files_of_the_previous_model(tmp_path, capsys):
    names = ["best_model.keras", "best_model.onnx", "compression_report.json", "decision.json", "MODEL_CARD.md"]
    for name in names:
        (tmp_path / name).write_text("")
    labels = np.array([[1, 0, 1], [0, 0, 1]], np.float32)
    training = SimpleNamespace(labels=labels, paths=["photos/a.jpg", "photos/b.jpg"])
    validation = SimpleNamespace(labels=labels[:1], paths=["photos/c.jpg"])
    folders = {"save_model_path": str(tmp_path), "load_model_path": str(tmp_path)}
    configs = Configs(**folders, train_csv="a.csv", test_csv="b.csv", classes=["cat", "dog", "owl"], overwrite=True)
    run = Run(configs, Team(), None, Images(training, validation), None, None, None, Interruption())
    with open_run(run):
        os.remove(tmp_path / LOCK_FILE)
    assert sorted(os.listdir(tmp_path)) == sorted([*names[:3], "configs.json", "data.json", "trained_images.csv"])
    printed = capsys.readouterr().out
    assert all(str(tmp_path / name) in printed for name in names[3:])
    stored = json.loads((tmp_path / "data.json").read_text())
    found = {name: [stored[name][key] for key in ("csv", "images", "sha256")] for name in ("training", "validation")}
    assert found == {
        "training": ["a.csv", 2, digest(labels, ["a.jpg", "b.jpg"])],
        "validation": ["b.csv", 1, digest(labels[:1], ["c.jpg"])],
    }
    assert stored["training"]["classes"] == {"cat": 1, "dog": 0, "owl": 2}
    assert stored["working_directory"] == os.getcwd()


def test_new_run_removes_all_files_of_the_previous_model_but_follows_no_link(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    endings = ".keras _compressed.h5 _compressed.json _compressed.rejected.h5 _compressed.rejected.json .tflite .onnx"
    endings += " .rejected.tflite _dynamic.tflite _int8.tflite _int8.rejected.tflite .rejected.onnx _labels.txt"
    stems = ("best_model", "latest_model", "model_epoch_012")
    files = [f"{stem}{ending}" for stem in stems for ending in (endings + " _metadata.json").split()]
    files += ["training_log.csv", "training_log.png", ".training_stats.json", "configs.json", "data.json"]
    files += ["trained_images.csv", "MODEL_CARD.md", "compression_report.json", "decision.json", "best_auroc.log"]
    folders = ["evaluation", "cam_output", "best_model_saved_model", "best_model_saved_model.rejected"]
    folders += ["evaluation_best_model_int8.tflite", "evaluation_best_model_saved_model", "evaluation_best_model.onnx"]
    mine = ["notes.txt", "best_model_of_2019.onnx", "evaluation_notes.txt", "data_report.csv", "my_best_model.tflite"]
    for name in [*(f"{name}/part" for name in [*folders, "../elsewhere"]), *files, *mine]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("")
    (run / "logs").symlink_to(elsewhere)
    clear_folder(str(run), overwrites=True)
    assert sorted(os.listdir(run)) == sorted(mine)
    assert os.listdir(elsewhere) == ["part"]


def test_card_of_many_classes_lists_the_worst_and_the_smallest(tmp_path):
    names = [f"class {number:03d}" for number in range(101)]
    results = single_label() | {"classes": names}
    row = {"precision": 0.5, "recall": 0.5, "support": 30}
    per_class = {name: row | {"f1": 0.9 if number % 5 else 0.5} for number, name in enumerate(names)}
    results["sets"] = {"test": results["sets"]["test"] | {"per_class": per_class}}
    counts = {name: 100 - number for number, name in enumerate(names)}
    data = {name: part | {"classes": counts} for name, part in make_data([1, 1, 1]).items()}
    write_run(tmp_path, results, {"data.json": data}, classes=names)
    _, card = read_card(tmp_path)
    worst, smallest = (
        [line[0] for line in table[1:]] for table in card.tables if table[0][0] in ("Class on the test set", "Class")
    )
    assert worst == [f"class {number:03d}" for number in range(0, 100, 5)]
    assert smallest == [f"class {number:03d}" for number in range(100, 80, -1)]
