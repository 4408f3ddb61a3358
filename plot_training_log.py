"""Plots training and validation loss and accuracy (or AUROC) over the epochs, as a picture next to the log."""

from __future__ import annotations

import dataclasses
import os

from configs import Configs
from finetune.core.options import define
from finetune.core.scripts import run_script, script

PICTURE_SUFFIXES = (".png", ".pdf", ".svg")


def picture_fault(path: str) -> str:
    """Returns what is wrong with the name of a picture; empty if nothing is."""
    if not path or path.lower().endswith(PICTURE_SUFFIXES):
        return ""
    return f"expected a name that ends in {', '.join(PICTURE_SUFFIXES)}. Received: {path!r}"


@dataclasses.dataclass
class PlotConfigs(Configs):
    """The options of this script in addition to the shared ones."""

    train_log_path: str = define(
        "", "Log file to plot; empty takes the log in load_model_path, or else in save_model_path"
    )
    write_path: str = define("", "Picture to write; empty writes a PNG next to the log", check=picture_fault)


@script
def main(configs: PlotConfigs) -> dict:
    """Draws the log and shows it if there is a display; returns the picture's path."""
    # Imported here, so that --help does not wait for matplotlib.
    from finetune.core.files import atomic_path, check_folder
    from finetune.reporting.figures import draw_log, read_log, select_backend
    from finetune.training.run_folder import find_log

    log_path = configs.train_log_path or find_log(configs.load_model_path or configs.save_model_path)
    log = read_log(log_path)
    has_display = select_backend()

    import matplotlib.pyplot as plt

    picture_path = configs.write_path or f"{os.path.splitext(log_path)[0]}.png"
    check_folder(os.path.dirname(picture_path) or os.curdir, "write_path")
    figure = draw_log(log, plt.figure())
    with atomic_path(picture_path) as temporary:
        figure.savefig(temporary, dpi=120)
    print(f"Wrote {picture_path}")
    if has_display:
        plt.show()
    return {"path": picture_path}


if __name__ == "__main__":
    run_script(main)
