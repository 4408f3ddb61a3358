"""Options: precedence, conversion, checks, and the messages about mistakes."""

import json
import re

import pytest
from config_files import SCRIPT_CONFIGS, run_python

from configs import Configs
from finetune.core import options
from finetune.core.options import UserError
from finetune.models.backbones import BACKBONES
from model import check_registered
from predict import PredictConfigs
from split_train_test import SplitConfigs


def read_flags(*flags, configs_class=Configs):
    return configs_class.from_command_line(arguments=flags)


def write_json(path, **values):
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("configs_class", dict.fromkeys(SCRIPT_CONFIGS.values()))
def test_defaults_are_valid_and_descriptions_are_short(configs_class):
    assert configs_class().validate().to_dict() == configs_class.defaults()
    assert set(Configs.options()) <= set(configs_class.options())
    texts = {name: field.metadata["description"] for name, field in configs_class.options().items()}
    assert [name for name, text in texts.items() if not 1 <= len(text.split()) <= 20] == []


# Precedence


def test_flag_beats_json_beats_default(tmp_path):
    path = write_json(tmp_path / "a.json", batch_size=32, num_epochs=5)
    for flags in (("--batch_size", "64", "--configs", path), ("--configs", path, "--batch_size", "64")):
        configs = read_flags(*flags)
        assert (configs.batch_size, configs.num_epochs, configs.reduce_lr_patience) == (64, 5, 3)


def test_given_options_are_those_of_json_and_flags_even_at_their_default(tmp_path):
    path = write_json(tmp_path / "a.json", batch_size=16)
    configs = read_flags("--configs", path, "--image_target_size", "224", "224", "3")
    assert configs.given == {"batch_size", "image_target_size"}


def test_copies_share_nothing():
    configs = Configs()
    assert configs.replace(batch_size=4).batch_size == 4
    assert configs.batch_size == 16
    configs.classifier_layer_sizes.append(7)
    assert Configs().classifier_layer_sizes == [0.4]


# Types


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        *((["--overwrite", text], "overwrite", True) for text in ("True", "true", "1", "yes")),
        *((["--overwrite", text], "overwrite", False) for text in ("FALSE", "false", "0", "no")),
        (["--image_target_size", "96", "80", "3"], "image_target_size", (96, 80, 3)),
        (["--classifier_layer_sizes"], "classifier_layer_sizes", []),
        (["--classifier_layer_sizes", "256", "0.4"], "classifier_layer_sizes", [256.0, 0.4]),
        (["--final_layer_pooling", "None"], "final_layer_pooling", None),
        (["--final_layer_pooling", "max"], "final_layer_pooling", "max"),
        (["--classes", "none"], "classes", None),
        (["--classes", "cat", "none"], "classes", ["cat", "none"]),
        (["--classes", "big cat", "Ärmel"], "classes", ["big cat", "Ärmel"]),
        (["--random_seed", "none"], "random_seed", None),
        (["--conv_layers_to_train", "-1"], "conv_layers_to_train", -1),
        (["--conv_layers_to_train=5"], "conv_layers_to_train", 5),
        (["--image_directory", ""], "image_directory", ""),
        (["--learning_rate", "1e-4"], "learning_rate", 0.0001),
    ],
)
def test_flag_is_read(flags, name, value):
    read = getattr(read_flags(*flags), name)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *((["--overwrite", text], "overwrite: expected True or False") for text in ("", "2", "on", "None")),
        *(
            ([f"--learning_rate={text}"], "learning_rate: expected a number")
            for text in ("1e-3x", "", "nan", "-inf", "1,5", "0x10")
        ),
        (["--image_target_size", "96", "96"], "image_target_size: expected 3 whole numbers"),
        (["--image_target_size", "96,96,3"], "image_target_size: expected 3 whole numbers, with blanks between them"),
        (["--classifier_layer_sizes", "256", "x"], "classifier_layer_sizes: expected a list of numbers"),
        (["--batch_size"], "batch_size.*expected one argument"),
        (["--batch_size", "none"], "batch_size: expected a whole number"),
        (["--batch_size", "16.0"], "batch_size: expected a whole number"),
        (["--batch_size", "0"], "batch_size: expected .*at least 1"),
        (["--configs"], "configs.*expected one argument"),
        (["--learning_rate", "-1e-3"], "learning_rate"),
        (["--batchsize", "4"], "Did you mean --batch_size"),
        (["--batch", "4"], "Did you mean --batch_size"),
        (["--bach_size=4"], "Did you mean --batch_size"),
        (["-batch_size", "4"], r"Unknown option -batch_size\. Did you mean --batch_size"),
        (["./zzz"], r"Expected --OPTION VALUE\. Received '\./zzz'"),
        (["--zzz", "4"], r"Unknown option --zzz\. See --help"),
        (["--shuffle", "True"], "Unknown option --shuffle"),
    ],
)
def test_unusable_flag_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        read_flags(*flags)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", True),
        ("batch_size", 4.0),
        ("batch_size", "4"),
        ("batch_size", None),
        ("learning_rate", True),
        ("learning_rate", float("nan")),
        ("learning_rate", 10**400),
        ("show_model_summary", 1),
        ("show_model_summary", "True"),
        ("train_csv", 3),
        ("classes", "cat"),
        ("classes", [None]),
        ("classifier_layer_sizes", 256),
        ("classifier_layer_sizes", [True]),
        ("image_target_size", [96, 96]),
        ("image_target_size", [96.0, 96, 3]),
        ("final_layer_pooling", False),
    ],
)
def test_wrong_type_is_refused(tmp_path, name, value):
    configs = Configs()
    setattr(configs, name, value)
    path = write_json(tmp_path / "a.json", **{name: value})
    for read in (configs.validate, lambda: Configs.from_json(path)):
        with pytest.raises(UserError, match=rf"{name}: expected .*Received: "):
            read()


def test_json_round_trip_keeps_types(tmp_path):
    configs = Configs(image_target_size=(96, 80, 3), classes=["b", "a"], final_layer_pooling=None, learning_rate=1)
    configs.classifier_layer_sizes = [256, 0.4]
    restored = Configs.from_json(write_json(tmp_path / "a.json", **configs.to_dict()))
    assert restored == configs
    assert restored.image_target_size == (96, 80, 3)
    assert [type(number) for number in (restored.learning_rate, *restored.classifier_layer_sizes)] == [float] * 3


# Names


def test_unknown_names_get_the_nearest_option():
    with pytest.raises(AttributeError, match="Did you mean num_epochs"):
        Configs().number_epochs = 3
    assert read_flags("--shuffle", "False", configs_class=SplitConfigs).shuffle is False


@pytest.mark.parametrize(
    ("old", "value", "flags", "new"),
    [("test_image_size", [64, 48], ["64", "48"], "eval_image_size"), ("tta", "8", ["8"], "test_time_augmentation")],
)
def test_the_former_name_of_an_option_still_works(tmp_path, capsys, old, value, flags, new):
    path = write_json(tmp_path / "a.json", **{old: value})
    for arguments in ([f"--{old}", *flags], ["--configs", path], ["--configs", path, f"--{new}", *flags]):
        options._print_renamed.cache_clear()
        configs = read_flags(*arguments, configs_class=PredictConfigs)
        assert getattr(configs, new) == value
        assert configs.given == {new}
        assert re.fullmatch(f".*{old}.*{new}.*\n", capsys.readouterr().out)
    with pytest.raises(UserError, match=f"{old}.*{new}"):
        read_flags(f"--{old}", *flags, f"--{new}", *flags, configs_class=PredictConfigs)


# JSON files


def test_all_faults_of_a_json_file_are_reported_at_once(tmp_path):
    with pytest.raises(UserError) as raised:
        Configs.from_json(write_json(tmp_path / "a.json", bach_size=1, num_epochs="x", learning_rate=True))
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    for name, line in zip(["bach_size. Did you mean batch_size", "num_epochs", "learning_rate"], lines, strict=True):
        assert name in line
        assert "a.json" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"batch_size": 1, "batch_size": 2}', "batch_size.* twice"),
        (b" " * 2**24 + b"{}", "expected a configs file of at most"),
    ],
)
def test_file_without_options_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Configs.from_json(str(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_configs_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(UserError, match="Cannot read the configs file"):
        read_flags("--configs", str(tmp_path / name))


# Bounds and combinations


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("image_target_size", (1, 1, 3), (0, 1, 3)),
        ("image_target_size", (32, 32, 3), (32, 32, 1)),
        ("classifier_layer_sizes", [1.0, 512.0, 0.999], [1.5]),
        ("classifier_layer_sizes", [0.0], [-0.1]),
        ("conv_layers_to_train", -1, -2),
        ("learning_rate", 1e-12, 0.0),
        ("learning_rate_decay_factor", 0.999, 1.0),
        ("gpu_percentage", 1.0, 1.01),
        ("batch_size", 1, 0),
        ("multilabel_threshold_range", [0.001, 0.5], [0.0, 0.5]),
        ("multilabel_threshold_range", [0.5, 0.5], [0.6, 0.5]),
        ("multilabel_threshold_range", [0.1, 0.9], [0.1, 0.5, 0.9]),
        ("random_crop_area", [0.2, 1.0], [1.0, 0.2]),
        ("random_seed", 4294967295, 4294967296),
        # float32 has no number between 0.99999999 and 1, and a decay of 1 would not train.
        ("adam_beta_2", 0.9999, 0.99999999),
        # In float32 1e-46 is 0, and a step without gradients would be 0 / 0.
        ("adam_epsilon", 1e-12, 1e-46),
        ("cam_method", "layercam", "cam"),
        ("final_layer_pooling", None, "none"),
        ("classes", ["a", "b"], ["a", "b", "a"]),
        ("save_model_path", "x", ""),
        ("time_budget", "10m", "0"),
        ("pixel_range", [0.0, 1.0, 0.0, 255.0], [1.0, 0.0]),
    ],
)
def test_bound(name, accepted, refused):
    assert getattr(Configs(**{name: accepted}).validate(), name) == accepted
    with pytest.raises(UserError, match=rf"^{name}: expected .*Received: .+") as raised:
        Configs(**{name: refused}).validate()
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["test_split_fraction", "validation_split_fraction"])
def test_bound_of_a_script_s_own_option(name):
    for refused in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"{name}: expected a number"):
            SplitConfigs(**{name: refused}).validate()


def test_names_of_backbones_are_checked():
    assert len(BACKBONES) == 40
    for name in BACKBONES:
        check_registered(Configs(visual_model_name=name).validate())
    with pytest.raises(UserError, match="did you mean DenseNet121"):
        check_registered(Configs(visual_model_name="Densenet121"))


def test_choice_that_may_be_none_says_so():
    with pytest.raises(UserError, match=r"expected one of avg, max or none\. Received: 'mean'"):
        Configs(final_layer_pooling="mean").validate()


def test_all_faults_are_reported_at_once():
    wrong = {"cam_method": "VGG", "image_target_size": (32, 32, 1), "num_epochs": "ten", "save_model_path": ""}
    wrong |= {"learning_rate": -1.0, "batch_size": 0}
    with pytest.raises(UserError) as raised:
        Configs(**wrong).validate()
    assert {line.split(":")[0] for line in str(raised.value).splitlines()} == set(wrong)


# Scripts


def test_unknown_flag_of_a_real_script_ends_in_one_line():
    result = run_python("train.py", "--learning_rte", "0.1")
    assert result.returncode == 2
    assert result.stderr == "Error: Unknown option --learning_rte. Did you mean --learning_rate?\n"


HELP_OF_ALL = """
import contextlib, runpy, sys
sys.path.insert(0, ".")
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    print("Script", script)
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
heavy = {"tensorflow", "keras", "pandas", "matplotlib", "sklearn", "imgaug"}
sys.exit(" ".join(heavy & set(sys.modules)) or 0)
"""


def test_help_names_every_option_and_loads_nothing_heavy():
    result = run_python("-c", HELP_OF_ALL, *SCRIPT_CONFIGS)
    assert (result.returncode, result.stderr) == (0, "")
    shown = dict(zip(SCRIPT_CONFIGS, result.stdout.split("Script ")[1:], strict=True))
    for script, configs_class in SCRIPT_CONFIGS.items():
        words = shown[script].split()
        assert [name for name in ["configs", *configs_class.options()] if f"--{name}" not in words] == []
