"""How options are declared, how scripts end, and the text of --help."""

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
        "from configs import Configs\nfrom finetune.core.options import UserError\n"
        "from finetune.core.scripts import interrupt, run_script\n\n"
        f"def main(configs: Configs):\n    {body}\n\nrun_script(main)\n",
        encoding="utf-8",
    )
    (tmp_path / "interrupted_library.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException as error:\n    raise ImportError('the library failed') from error\n"
    )
    return run_python(str(script), cwd=tmp_path)


# Background jobs of a shell ignore SIGINT, and the tests may run in one.
@pytest.mark.parametrize(
    ("body", "status", "output", "errors"),
    [
        ("print(configs.batch_size)", 0, "16\n", "^$"),
        ('raise UserError("x is wrong. Correct it.")', 2, "", r"^Error: x is wrong\. Correct it\.\n$"),
        ("return 1 / 0", 1, "", "^Traceback(.|\n)*ZeroDivisionError"),
        (
            "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT)",
            *(130, "", "^Interrupted.\n$"),
        ),
        ("signal.signal(signal.SIGINT, interrupt); import interrupted_library", 130, "", "^Interrupted.\n$"),
    ],
)
def test_ends_of_a_script(tmp_path, body, status, output, errors):
    result = run_tiny_script(tmp_path, body)
    assert (result.returncode, result.stdout) == (status, output)
    assert re.search(errors, result.stderr)


def test_groups():
    assert {field.metadata["group"] for field in Configs.options().values()} == set(GROUPS) - {""}
    with pytest.raises(ValueError, match="group: expected one of common, data"):
        define(1, "A number", group="misc")


@pytest.mark.parametrize("configs_class", [Configs, PredictConfigs, CompressConfigs])
def test_help_begins_with_the_script_s_own_and_the_most_used_options(capsys, configs_class):
    with pytest.raises(SystemExit):
        configs_class.from_command_line("A head.", ["--help"])
    shown = capsys.readouterr().out
    parts = re.split(r"^(\w.*):$", shown, flags=re.M)
    parts = zip(parts[1::2], parts[2::2], strict=True)
    found = {title: re.findall(r"^  --(\w+)", text, flags=re.M) for title, text in parts}
    own = configs_class.own_options()
    assert list(found)[: 2 + bool(own)] == ["options", *["Options of this script"] * bool(own), "Most used"]
    assert found.get("Options of this script", []) == own
    assert set(own) >= set(configs_class.options()) - set(Configs.options())
    assert {"configs", "train_csv", "visual_model_name", "num_epochs", "batch_size"} < {*found["Most used"]}
    assert sorted(name for names in found.values() for name in names) == sorted(["configs", *configs_class.options()])
    shown = " ".join(shown.split())
    # The usage line does not list all flags.
    assert re.match(r"usage: \S+ \[--configs FILE.json\] \[--OPTION VALUE \.\.\.\] A head\.", shown)
    assert shown.count("; default ") == len(configs_class.options())
    assert "(3 whole numbers from 1 to 16384; default 224 224 3)" in shown


def test_a_script_may_declare_an_option_differently():
    assert "test_time_augmentation" in PredictConfigs.own_options()
    assert "test_time_augmentation" not in str(PredictConfigs.grouped_options())
    assert PredictConfigs(test_time_augmentation="8").validate().test_time_augmentation == "8"
    with pytest.raises(UserError, match="test_time_augmentation"):
        Configs(test_time_augmentation="8").validate()


def test_help_is_quick():
    times = []
    # TensorFlow alone takes longer. The best of three, as other processes may use the cores.
    while len(times) < 3 and min(times, default=9) > 3:
        start = time.monotonic()
        assert run_python("train.py", "--help").returncode == 0
        times.append(time.monotonic() - start)
    assert min(times) < 3


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
        # All at once.
        (["--bach_size", "4", "--num_epoch=3"], "Did you mean --batch_size?\nUnknown option --num_epoch. Did you mean"),
    ],
)
def test_misspelt_value_or_flag_names_the_nearest(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CompressConfigs.from_command_line(None, arguments)
