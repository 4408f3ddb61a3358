"""Plots loss and accuracy (or AUROC) over the epochs, training against validation, as a PNG beside the log."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from configs import Configs, UserError, define, run_script
from utils import atomic_path

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

METRICS = {"accuracy": "Accuracy", "auroc": "Mean AUROC", "loss": "Loss"}


@dataclasses.dataclass
class PlotConfigs(Configs):
    """The options of this script, beside those of every script."""

    train_log_path: str = define("", "The log to plot; empty takes training_log.csv in save_model_path")


def main(configs: PlotConfigs) -> dict:
    """Reads the log, draws it, shows it where there is a display; returns the picture's path."""
    log_path = configs.train_log_path or os.path.join(configs.save_model_path, "training_log.csv")
    log = read_log(log_path)
    has_display = select_backend()
    figure = draw_log(log)
    picture_path = f"{os.path.splitext(log_path)[0]}.png"
    with atomic_path(picture_path) as temporary:
        figure.savefig(temporary, dpi=120)
    print(f"Wrote {picture_path}")
    if has_display:
        import matplotlib.pyplot as plt

        plt.show()
    return {"path": picture_path}


def read_log(log_path: str) -> pd.DataFrame:
    """Reads a training log.

    Raises:
        UserError: it is missing or is no training log.
    """
    import pandas as pd

    try:
        log = pd.read_csv(log_path)
    except OSError as error:
        raise UserError(f"Cannot read the training log {log_path}: {error.strerror}. Train first.") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{log_path} is not a training log: {str(error).strip()}") from error
    plotted = [name for name in log if name == "epoch" or name.removeprefix("val_") in METRICS]
    is_numeric = all(pd.api.types.is_numeric_dtype(log[name]) for name in plotted)
    if not {"epoch", "loss"} <= set(plotted) or log.empty or not is_numeric:
        raise UserError(
            f"{log_path} is not a training log. Expected columns of numbers, epoch and loss among them, and a row. "
            f"Received: {', '.join(log.columns)}; {len(log)} rows."
        )
    return log


def select_backend() -> bool:
    """Chooses matplotlib's file-only backend where there is no display; returns whether there is one."""
    import matplotlib

    has_display = sys.platform in ("win32", "darwin") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    if not has_display or matplotlib.get_backend().lower() == "agg":
        matplotlib.use("agg")
        return False
    return True


def draw_log(log: pd.DataFrame) -> Figure:
    """Draws each metric of a log in a panel of its own; returns the matplotlib figure."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    metrics = [name for name in METRICS if name in log]
    figure, panels = plt.subplots(1, len(metrics), figsize=(5.5 * len(metrics), 4), squeeze=False, layout="constrained")
    for name, panel in zip(metrics, panels[0], strict=True):
        panel.plot(log["epoch"], log[name], marker=".", label="training")
        if f"val_{name}" in log:
            panel.plot(log["epoch"], log[f"val_{name}"], marker=".", label="validation")
        panel.set(xlabel="Epoch", ylabel=METRICS[name], title=METRICS[name])
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


if __name__ == "__main__":
    run_script(main, PlotConfigs)
