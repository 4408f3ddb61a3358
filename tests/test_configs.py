"""Options: where a value comes from, how it is read and checked, and what a script says of a mistake."""

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


def write_json(path, **options):
    path.write_text(json.dumps(options), encoding="utf-8")
    return str(path)


# Names, order and defaults


@pytest.mark.parametrize("configs_class", dict.fromkeys(SCRIPT_CONFIGS.values()))
def test_defaults_are_valid_and_every_option_is_described(configs_class):
    assert configs_class().validate().to_dict() == configs_class.defaults()
    assert set(Configs.options()) <= set(configs_class.options())
    assert all(field.metadata["description"] for field in configs_class.options().values())


def test_list_default_is_not_shared_between_configs():
    Configs().classifier_layer_sizes.append(7)
    assert Configs().classifier_layer_sizes == [0.4]


# Precedence


def test_flag_beats_json_beats_default(tmp_path):
    path = write_json(tmp_path / "a.json", batch_size=32, num_epochs=5)
    assert read_flags("--batch_size", "64", "--configs", path).batch_size == 64
    configs = read_flags("--configs", path, "--batch_size", "64")
    assert (configs.batch_size, configs.num_epochs, configs.reduce_lr_patience) == (64, 5, 3)


def test_given_options_are_those_of_json_and_flags_even_at_their_default(tmp_path):
    path = write_json(tmp_path / "a.json", batch_size=16)
    assert read_flags("--configs", path, "--image_target_size", "224", "224", "3").given == {
        "batch_size",
        "image_target_size",
    }


def test_replace_changes_a_copy():
    configs = Configs()
    assert configs.replace(batch_size=4).batch_size == 4
    assert configs.batch_size == 16


# Booleans and numbers


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "1", "yes", "False", "false", "FALSE", "0", "no"])
def test_flag_of_a_boolean(text):
    assert read_flags("--overwrite", text).overwrite is (text.lower() in ("true", "1", "yes"))


@pytest.mark.parametrize("text", ["", "2", "on", "truee", "None"])
def test_flag_that_is_no_boolean_is_refused(text):
    with pytest.raises(UserError, match="show_model_summary: expected True or False"):
        read_flags("--show_model_summary", text)


def from_attribute(path, name, value):
    configs = Configs()
    setattr(configs, name, value)
    configs.validate()


def from_json(path, name, value):
    Configs.from_json(write_json(path, **{name: value}))


@pytest.mark.parametrize("read", [from_attribute, from_json])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", True),
        ("learning_rate", True),
        ("show_model_summary", 1),
        ("show_model_summary", "True"),
        ("batch_size", 4.0),
        ("batch_size", "4"),
        ("batch_size", None),
        ("learning_rate", "0.1"),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", 10**400),
        ("train_csv", 3),
        ("classes", "cat"),
        ("classes", [1, 2]),
        ("classes", [None]),
        ("classifier_layer_sizes", 256),
        ("classifier_layer_sizes", [True]),
        ("image_target_size", [96, 96]),
        ("image_target_size", [96, 96, 3, 3]),
        ("image_target_size", [96.0, 96, 3]),
        ("final_layer_pooling", False),
    ],
)
def test_wrong_type_is_refused(tmp_path, read, name, value):
    with pytest.raises(UserError, match=rf"{name}: expected .*Received: "):
        read(tmp_path / "a.json", name, value)


def test_int_serves_as_float(tmp_path):
    configs = Configs.from_json(write_json(tmp_path / "a.json", learning_rate=1, classifier_layer_sizes=[256, 0.4]))
    assert type(configs.learning_rate) is float
    assert [type(size) for size in configs.classifier_layer_sizes] == [float, float]
    assert configs.classifier_layer_sizes == [256.0, 0.4]


@pytest.mark.parametrize("text", ["1e-3x", "", "nan", "inf", "-inf", "1,5", "0x10"])
def test_text_that_is_no_finite_number_is_refused(text):
    with pytest.raises(UserError, match="learning_rate: expected a number"):
        read_flags(f"--learning_rate={text}")


# Lists, tuples and none


def test_json_round_trip_keeps_tuples_lists_and_none(tmp_path):
    configs = Configs(
        image_target_size=(96, 80, 3), classes=["b", "a"], final_layer_pooling=None, classifier_layer_sizes=[]
    )
    restored = Configs.from_json(write_json(tmp_path / "a.json", **configs.to_dict()))
    assert restored == configs
    assert restored.image_target_size == (96, 80, 3)
    assert restored.final_layer_pooling is None
    assert Configs.from_json(write_json(tmp_path / "b.json", **Configs().to_dict())).classes is None


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--image_target_size", "96", "80", "3"], "image_target_size", (96, 80, 3)),
        (["--classifier_layer_sizes"], "classifier_layer_sizes", []),
        (["--classifier_layer_sizes", "256", "0.4"], "classifier_layer_sizes", [256.0, 0.4]),
        (["--final_layer_pooling", "none"], "final_layer_pooling", None),
        (["--final_layer_pooling", "None"], "final_layer_pooling", None),
        (["--final_layer_pooling", "max"], "final_layer_pooling", "max"),
        (["--classes", "none"], "classes", None),
        (["--classes", "cat", "dog"], "classes", ["cat", "dog"]),
        (["--classes", "cat", "none"], "classes", ["cat", "none"]),
        (["--classes", "big cat", "Ärmel"], "classes", ["big cat", "Ärmel"]),
        (["--random_seed", "none"], "random_seed", None),
        (["--batch_norm_momentum", "none"], "batch_norm_momentum", None),
        (["--conv_layers_to_train", "-1"], "conv_layers_to_train", -1),
        (["--conv_layers_to_train=5"], "conv_layers_to_train", 5),
        (["--image_directory", ""], "image_directory", ""),
        (["--learning_rate", "1e-4"], "learning_rate", 0.0001),
    ],
)
def test_flag_is_read(flags, name, value):
    read = getattr(read_flags(*flags), name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_target_size", "96", "96"], "image_target_size: expected 3 whole numbers"),
        (["--image_target_size", "96,96,3"], "image_target_size: expected 3 whole numbers, with blanks between them"),
        (["--image_target_size"], "image_target_size: expected 3 whole numbers"),
        (["--classifier_layer_sizes", "none"], "classifier_layer_sizes: expected a list of numbers"),
        (["--classifier_layer_sizes", "256", "x"], "classifier_layer_sizes: expected a list of numbers"),
        (["--batch_size"], "batch_size.*expected one argument"),
        (["--batch_size", "none"], "batch_size: expected a whole number"),
        (["--batch_size", "16.0"], "batch_size: expected a whole number"),
        (["--batch_size", "0"], "batch_size: expected .*at least 1"),
        (["--configs"], "configs.*expected one argument"),
        (["--learning_rate", "-1e-3"], "learning_rate"),
    ],
)
def test_flag_with_an_unusable_value_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        read_flags(*flags)


# Unknown options


@pytest.mark.parametrize("flag", ["--batchsize", "--batch-size", "--batch", "--bach_size=4"])
def test_unknown_flag_names_the_nearest_option(flag):
    with pytest.raises(UserError, match="Did you mean --batch_size"):
        read_flags(flag, "4")


def test_unknown_flag_without_a_near_option_points_to_help():
    with pytest.raises(
        UserError, match=r"Expected --OPTION VALUE\. Received '\./zzz' without an option in front of it"
    ):
        Configs.from_command_line(arguments=["./zzz"])
    with pytest.raises(UserError, match=r"Unknown option --zzz\. See --help"):
        read_flags("--zzz", "4")


def test_flag_with_one_hyphen_is_shown_as_it_was_typed():
    with pytest.raises(UserError, match=r"Unknown option -batch_size\. Did you mean --batch_size"):
        read_flags("-batch_size", "4")


def test_unknown_json_key_names_the_nearest_option_and_the_file(tmp_path):
    path = write_json(tmp_path / "a.json", learning_rat=0.1)
    with pytest.raises(UserError, match=r"a\.json: Unknown option learning_rat\. Did you mean learning_rate\?"):
        Configs.from_json(path)


def test_unknown_attribute_names_the_nearest_option():
    configs = Configs()
    with pytest.raises(AttributeError, match="Did you mean num_epochs"):
        configs.number_epochs = 3


def test_option_of_one_script_is_unknown_to_another():
    with pytest.raises(UserError, match="Unknown option --shuffle"):
        read_flags("--shuffle", "True")
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


def test_all_faults_of_a_json_file_are_reported_at_once(tmp_path):
    path = write_json(tmp_path / "a.json", bach_size=1, num_epochs="x", learning_rate=True)
    with pytest.raises(UserError) as raised:
        Configs.from_json(path)
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert all(name in line for name, line in zip(["batch_size", "num_epochs", "learning_rate"], lines, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"batch_size": 4', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
    ],
)
def test_file_that_holds_no_options_is_refused(tmp_path, content, message):
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
        ("num_epochs", 1, 0),
        ("classifier_layer_sizes", [0.0], [-0.1]),
        ("conv_layers_to_train", -1, -2),
        ("pop_conv_layers", 0, -1),
        ("learning_rate", 1e-12, 0.0),
        ("learning_rate_decay_factor", 1e-12, 0.0),
        ("learning_rate_decay_factor", 0.999, 1.0),
        ("reduce_lr_patience", 0, -1),
        ("minimum_learning_rate", 0.0, -1e-12),
        ("gpu_percentage", 0.0, -0.01),
        ("gpu_percentage", 1.0, 1.01),
        ("batch_size", 1, 0),
        ("multilabel_threshold_range", [0.001, 0.5], [0.0, 0.5]),
        ("multilabel_threshold_range", [0.5, 0.999], [0.5, 1.0]),
        ("generator_workers", 0, -1),
        ("generator_queue_length", 1, 0),
        ("positive_weights_multiply", 1e-12, 0.0),
        ("cnn_downscaling_factor", 0, -1),
        ("cnn_downscaling_filters", 1, 0),
        ("random_seed", 0, -1),
        ("random_seed", 4294967295, 4294967296),
        ("batch_norm_momentum", 0.0, -0.1),
        ("batch_norm_momentum", 0.999, 1.0),
        ("adam_beta_2", 0.0, -0.1),
        # float32 has no number between 0.99999999 and 1, which would be no training at all.
        ("adam_beta_2", 0.9999, 0.99999999),
        # In float32 1e-46 is 0, and a step without gradients 0 divided by 0.
        ("adam_epsilon", 1e-12, 1e-46),
        ("cam_method", "layercam", "cam"),
        ("final_layer_pooling", "max", "mean"),
        ("final_layer_pooling", None, "none"),
        ("image_target_size", (32, 32, 3), (32, 32, 1)),
        ("classifier_layer_sizes", [1.0, 512.0, 0.999], [1.5]),
        ("multilabel_threshold_range", [0.5, 0.5], [0.6, 0.5]),
        ("multilabel_threshold_range", [0.1, 0.9], [0.5]),
        ("multilabel_threshold_range", [0.1, 0.9], [0.1, 0.5, 0.9]),
        ("classes", ["a", "b"], ["a", "b", "a"]),
        ("save_model_path", "x", ""),
    ],
)
def test_bound(name, accepted, refused):
    assert getattr(Configs(**{name: accepted}).validate(), name) == accepted
    with pytest.raises(UserError, match=rf"^{name}: expected .*Received: .+") as raised:
        Configs(**{name: refused}).validate()
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["test_split_fraction", "validation_split_fraction"])
@pytest.mark.parametrize("refused", [-0.1, 1.0, 1.5])
def test_bound_of_a_script_s_own_option(name, refused):
    with pytest.raises(UserError, match=f"{name}: expected a number"):
        SplitConfigs(**{name: refused}).validate()


def test_every_backbone_name_is_accepted_once():
    assert len(BACKBONES) == 40
    for name in BACKBONES:
        check_registered(Configs(visual_model_name=name).validate())


def test_misspelt_choice_names_the_nearest():
    with pytest.raises(UserError, match="did you mean DenseNet121"):
        check_registered(Configs(visual_model_name="Densenet121"))


def test_choice_that_may_be_none_says_so():
    with pytest.raises(UserError, match=r"expected one of avg, max or none\. Received: 'mean'"):
        Configs(final_layer_pooling="mean").validate()


def test_all_faults_of_types_bounds_and_combinations_are_reported_at_once():
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


@pytest.mark.parametrize("script", SCRIPT_CONFIGS)
def test_help_names_every_option_and_loads_nothing_heavy(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "sys.path.insert(0, '.')\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'tensorflow', 'keras', 'pandas', 'matplotlib', 'sklearn', 'imgaug'} & set(sys.modules)\n"
        "    sys.stderr.write(' '.join(sorted(heavy)))\n"
    )
    result = run_python("-c", code)
    assert (result.returncode, result.stderr) == (0, "")
    words = result.stdout.split()
    assert [name for name in ["configs", *SCRIPT_CONFIGS[script].options()] if f"--{name}" not in words] == []
