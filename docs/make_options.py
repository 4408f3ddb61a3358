"""Writes docs/options.md from the declarations of the options; run it after every change to one."""

from __future__ import annotations

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from compare_backbones import CompareConfigs  # noqa: E402
from compress_weights import CompressConfigs  # noqa: E402
from configs import Configs  # noqa: E402
from find_label_errors import LabelErrorConfigs  # noqa: E402
from finetune.core.values import describe_values  # noqa: E402
from finetune.models.backbones import BACKBONES  # noqa: E402
from make_csv_from_folders import FolderConfigs  # noqa: E402
from plot_training_log import PlotConfigs  # noqa: E402
from predict import PredictConfigs  # noqa: E402
from split_train_test import SplitConfigs  # noqa: E402

PAGE = PROJECT / "docs" / "options.md"
SCRIPTS: dict[str, type[Configs]] = {
    "make_csv_from_folders.py": FolderConfigs,
    "split_train_test.py": SplitConfigs,
    "compare_backbones.py": CompareConfigs,
    "train.py": Configs,
    "test.py": Configs,
    "draw_activations.py": Configs,
    "plot_training_log.py": PlotConfigs,
    "compress_weights.py": CompressConfigs,
    "predict.py": PredictConfigs,
    "find_label_errors.py": LabelErrorConfigs,
}
INTRODUCTION = """\
# Options

`python docs/make_options.py` writes this page from the declarations in `configs.py` and the scripts.

`--configs FILE.json` overrides the defaults in `configs.py`, and a command-line flag overrides both. Every script takes
every option and `--help`. `none` on the command line is `null` in JSON. Defaults are in brackets."""


def make_page() -> str:
    """Returns the page: the options of every script, the backbones, and the scripts' own options."""
    parts = [INTRODUCTION, "## Options of every script"]
    for title, names in Configs.grouped_options().items():
        parts += [f"### {title}", make_list(Configs, names)]
    parts += ["## Backbones", f"Backbones: {', '.join(BACKBONES)}."]
    without_own = []
    for script, configs_class in SCRIPTS.items():
        if own := configs_class.own_options():
            parts += [f"## Options of {script} alone", make_list(configs_class, own)]
        else:
            without_own.append(f"`{script}`")
    parts += ["## Scripts without options of their own", f"{', '.join(without_own)}."]
    return "\n\n".join(parts) + "\n"


def make_list(configs_class: type[Configs], names: list[str]) -> str:
    """Returns a Markdown list of some of a class's options: name, default, description, and choices not named there."""
    options, types, defaults = configs_class.options(), configs_class.types(), configs_class.defaults()
    lines = []
    for name in names:
        description = options[name].metadata["description"]
        choices = options[name].metadata.get("choices") or ()
        if not all(str(choice) in description for choice in choices):
            description += f"; {describe_values(options[name].metadata, types[name])}"
        default = "''" if defaults[name] == "" else defaults[name]
        lines.append(f"- `{name}` (`{default}`): {description}.")
    return "\n".join(lines)


def main() -> None:
    """Writes the page."""
    PAGE.write_text(make_page(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
