"""How options are declared and told."""

import re
import time

import pytest
from config_files import PROJECT, run_python

from compress_weights import CompressConfigs
from configs import Configs
from finetune.core.options import GROUPS, UserError, define
from finetune.core.values import find_nearest
from predict import PredictConfigs


def run_tiny_script(tmp_path, body):
    script = tmp_path / "tiny.py"
    script.write_text(
        f'"""A tiny script."""\nimport os, signal, sys\nsys.path.insert(0, {str(PROJECT)!r})\n'
        "from configs import Configs\nfrom finetune.core.options import UserError, run_script\n\n"
        f"def main(configs: Configs):\n    {body}\n\nrun_script(main)\n",
        encoding="utf-8",
    )
    return run_python(str(script), cwd=tmp_path)


def test_mistake_ends_in_its_message_alone_and_status_2(tmp_path):
    result = run_tiny_script(tmp_path, 'raise UserError("x is wrong. Mend it.")')
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "Error: x is wrong. Mend it.\n")


def test_bug_keeps_its_traceback(tmp_path):
    result = run_tiny_script(tmp_path, "return 1 / 0")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in result.stderr


def test_interrupt_ends_in_130_without_a_traceback(tmp_path):
    # A shell starts its background jobs with the signal ignored, and the tests may run in one.
    heeding = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    result = run_tiny_script(tmp_path, f"{heeding}; os.kill(os.getpid(), signal.SIGINT)")
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def test_interrupt_within_an_import_ends_in_one_line_whatever_the_library_makes_of_it(tmp_path):
    (tmp_path / "slow_library.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException as error:\n    raise ImportError('the library failed') from error\n"
    )
    # A shell starts its background jobs with the signal ignored, and the tests may run in one.
    heeding = "from finetune.core.options import interrupt; signal.signal(signal.SIGINT, interrupt)"
    result = run_tiny_script(tmp_path, f"{heeding}; import slow_library")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def test_script_that_succeeds_ends_in_0(tmp_path):
    result = run_tiny_script(tmp_path, "print(configs.batch_size)")
    assert (result.returncode, result.stdout, result.stderr) == (0, "16\n", "")


# Groups


def read_help(capsys, configs_class):
    """Returns the flags of a class's help by the heading that they stand under."""
    with pytest.raises(SystemExit):
        configs_class.from_command_line("A head.", ["--help"])
    parts = re.split(r"^(\w.*):$", capsys.readouterr().out, flags=re.M)
    return {
        title: re.findall(r"^  --(\w+)", text, flags=re.M) for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_option_has_a_group_of_its_own_choice():
    assert {field.metadata["group"] for field in Configs.options().values()} == set(GROUPS) - {""}


def test_help_starts_with_what_is_used_most(capsys):
    told = read_help(capsys, Configs)
    titles = ["Most used", "Data", "Model", "Training", "Recipe of the training", "Input and speed"]
    assert list(told) == ["options", *titles, "Testing and explaining", "Machine"]
    assert told["Most used"][0] == "configs"
    assert len(told["Most used"]) == 13
    assert {"train_csv", "visual_model_name", "num_epochs", "batch_size"} < {*told["Most used"]}
    assert told["Machine"] == [
        "gpu_percentage",
        "deterministic",
        "distribution_strategy",
        "scale_learning_rate",
        "verbose",
    ]
    assert sorted(name for names in told.values() for name in names) == sorted(["configs", *Configs.options()])


@pytest.mark.parametrize("configs_class", [PredictConfigs, CompressConfigs])
def test_own_options_of_a_script_come_first(capsys, configs_class):
    told = read_help(capsys, configs_class)
    assert list(told)[:3] == ["options", "Options of this script", "Most used"]
    assert told["Options of this script"] == configs_class.own_options()
    assert set(told["Options of this script"]) == set(configs_class.options()) - set(Configs.options())


def test_help_tells_each_default_and_no_wall_of_flags(capsys):
    with pytest.raises(SystemExit):
        PredictConfigs.from_command_line("A head.", ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert re.match(r"usage: \S+ \[--configs FILE.json\] \[--OPTION VALUE \.\.\.\] A head\.", told)
    assert told.count("; default ") == len(PredictConfigs.options())
    assert "(3 whole numbers at least 1 and at most 16384; default 224 224 3)" in told
    assert "(text; default empty)" in told


def test_unknown_group_is_a_mistake_of_who_declares():
    with pytest.raises(ValueError, match="group: expected one of common, data"):
        define(1, "A number", group="misc")


def test_help_is_quick():
    start = time.monotonic()
    assert run_python("train.py", "--help").returncode == 0
    # TensorFlow alone takes longer.
    assert time.monotonic() - start < 3


# What was meant


@pytest.mark.parametrize(
    ("text", "known", "nearest"),
    [
        ("sgd", ("Adam", "SGD"), "SGD"),
        ("DENSENET121", ("DenseNet121", "DenseNet169"), "DenseNet121"),
        ("Mobilnet", ("VGG16", "MobileNet"), "MobileNet"),
        ("zzz", ("Adam", "SGD"), ""),
        ("", ("Adam", "SGD"), ""),
    ],
)
def test_nearest_name_is_found_whatever_its_case(text, known, nearest):
    assert find_nearest(text, known, alikeness=0.4) == nearest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cam_method", "layer_cam"], "Received: 'layer_cam'; did you mean layercam?"),
        (["--export", "tflight"], "did you mean tflite?"),
        (["--LEARNING_RATE", "1"], "Unknown option --LEARNING_RATE. Did you mean --learning_rate?"),
        (["--expotr", "onnx"], "Did you mean --export?"),
    ],
)
def test_misspelt_value_or_flag_names_the_nearest(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CompressConfigs.from_command_line(None, arguments)


def test_all_misspelt_flags_are_told_at_once():
    with pytest.raises(UserError) as raised:
        Configs.from_command_line(None, ["--bach_size", "4", "--num_epoch=3", "--loss", "focal"])
    assert str(raised.value).splitlines() == [
        "Unknown option --bach_size. Did you mean --batch_size?",
        "Unknown option --num_epoch. Did you mean --num_epochs?",
    ]
