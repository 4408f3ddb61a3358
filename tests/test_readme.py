"""The README says what the code does."""

import dataclasses
import re
from pathlib import Path

from compress_weights import CompressConfigs
from configs import BACKBONE_NAMES, Configs
from make_csv_from_folders import FolderConfigs
from plot_training_log import PlotConfigs
from predict import PredictConfigs
from split_train_test import SplitConfigs

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
SCRIPT_CONFIGS = {
    "make_csv_from_folders.py": FolderConfigs,
    "split_train_test.py": SplitConfigs,
    "train.py": Configs,
    "test.py": Configs,
    "draw_activations.py": Configs,
    "plot_training_log.py": PlotConfigs,
    "compress_weights.py": CompressConfigs,
    "predict.py": PredictConfigs,
}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [line for block in blocks for line in block.splitlines()]


def test_options_table_holds_every_option_with_its_default_and_description():
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*?) \|$", README, re.M)
    expected = [
        (name, str(Configs.defaults()[name]) or "''", option.metadata["description"])
        for name, option in Configs.options().items()
    ]
    assert rows == expected


def test_every_backbone_is_listed():
    listed = re.search(r"^Backbones: (.*)\.$", README, re.M).group(1)
    assert listed.split(", ") == list(BACKBONE_NAMES)


def test_every_command_parses():
    scripts = set()
    for command in commands():
        for part in command.split("&&"):
            words = part.split()
            if words[0] == "python" and words[1].endswith(".py"):
                scripts.add(words[1])
                SCRIPT_CONFIGS[words[1]].from_command_line(arguments=words[2:])
    assert scripts == set(SCRIPT_CONFIGS)


def test_first_commands_set_up_train_and_test():
    first, second = commands()[:2]
    assert "pip install -r requirements.txt" in first
    assert "python train.py --configs data/demo.json" in first
    assert "pip install -r tests/requirements.txt" in second
    assert second.endswith("python -m pytest")


def test_every_picture_and_file_named_exists():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (PROJECT / path).is_file(), path


def test_demo_configs_only_name_options():
    assert Configs.from_json(str(PROJECT / "data" / "demo.json")).validate().visual_model_name == "MobileNet"


def test_scripts_options_are_named_in_the_readme():
    for script_configs in SCRIPT_CONFIGS.values():
        own = {field.name for field in dataclasses.fields(script_configs)} - set(Configs.options())
        for name in own:
            assert f"--{name}" in README
