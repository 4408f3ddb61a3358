"""Plots loss and accuracy (or AUROC) over the epochs, training against validation, as a PNG beside the log."""

from __future__ import annotations

import dataclasses
import os

from configs import Configs
from finetune.options import define, run_script, script


@dataclasses.dataclass
class PlotConfigs(Configs):
    """The options of this script, beside those of every script."""

    train_log_path: str = define(
        "", "The log to plot; empty takes that of the run of load_model_path, or of save_model_path"
    )


@script
def main(configs: PlotConfigs) -> dict:
    """Reads the log, draws it, shows it where there is a display; returns the picture's path."""
    # Imported here, so that --help does not wait for matplotlib.
    from finetune.files import atomic_path
    from finetune.log_figures import draw_log, read_log, select_backend
    from finetune.run_folder import find_log

    log_path = configs.train_log_path or find_log(configs.load_model_path or configs.save_model_path)
    log = read_log(log_path)
    has_display = select_backend()

    import matplotlib.pyplot as plt

    figure = draw_log(log, plt.figure())
    picture_path = f"{os.path.splitext(log_path)[0]}.png"
    with atomic_path(picture_path) as temporary:
        figure.savefig(temporary, dpi=120)
    print(f"Wrote {picture_path}")
    if has_display:
        plt.show()
    return {"path": picture_path}


if __name__ == "__main__":
    run_script(main)
