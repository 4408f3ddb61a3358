"""What stops a run early: a loss that is not finite, patience, and signals."""

import math
from types import SimpleNamespace

import pytest
from small_runs import (
    options_of,
    start,
    tables,  # noqa: F401
)

from configs import Configs
from finetune.core.options import UserError
from finetune.training import resuming
from finetune.training.checkpoints import FiniteLoss, Stopping, write_resume_command
from finetune.training.resuming import save_checkpoint
from finetune.training.run import Progress


class Writer:
    """Records what is saved."""

    folder = "runs/a"

    def __init__(self, **options):
        self.saved = []
        self.progress = Progress(best_epoch=1)
        self.run = SimpleNamespace(configs=Configs(**options), interruption=SimpleNamespace(signal=0))

    def save(self, names, *moment):
        self.saved.append((names, *moment))


def build(**options):
    """Returns a callback in the second epoch, with a `Writer`."""
    stopping = Stopping(Writer(**options), SimpleNamespace(epoch=1, first_step=2, steps=7))
    stopping.set_model(SimpleNamespace(stop_training=False))
    return stopping


def test_a_signal_ends_the_run_after_its_step_is_saved(capsys):
    stopping = build()
    stopping.on_train_batch_end(0)
    assert stopping.writer.saved == []
    stopping.writer.run.interruption.signal = 15
    with pytest.raises(SystemExit) as stopped:
        stopping.on_train_batch_end(1)
    assert stopped.value.code == 143
    assert stopping.writer.saved == [(["latest_model.keras"], 1, 4)]
    assert "Stopped by SIGTERM. Continue with\npython train.py" in capsys.readouterr().out


def test_a_signal_in_the_last_step_waits_for_validation():
    stopping = build()
    stopping.writer.run.interruption.signal = 2
    stopping.on_train_batch_end(4)
    with pytest.raises(SystemExit) as stopped:
        stopping.on_epoch_end(1)
    assert stopped.value.code == 130
    assert stopping.writer.saved == []


@pytest.mark.parametrize(("patience", "epoch", "stops"), [(0, 9, False), (3, 2, False), (3, 3, True)])
def test_patience_counts_from_the_best_epoch(patience, epoch, stops):
    stopping = build(early_stopping_patience=patience)
    stopping.on_epoch_end(epoch)
    assert stopping.model.stop_training is stops


def test_a_loss_that_is_not_finite_names_its_step():
    finite = FiniteLoss("runs/a", SimpleNamespace(epoch=1, first_step=2))
    finite.on_train_batch_end(0, {"loss": 1.0})
    finite.on_epoch_end(1, {"val_loss": 1.0})
    with pytest.raises(UserError, match="The loss is nan in epoch 2, step 4"):
        finite.on_train_batch_end(1, {"loss": math.nan})
    with pytest.raises(UserError, match="The validation loss is inf in epoch 2."):
        finite.on_epoch_end(1, {"val_loss": math.inf})


def test_the_command_to_continue_is_quoted_and_names_the_script_as_started(monkeypatch):
    monkeypatch.setattr("sys.argv", ["../my scripts/train.py", "--num_epochs", "3"])
    assert write_resume_command("runs/b 1") == (
        "python '../my scripts/train.py' --configs 'runs/b 1/configs.json' --load_model_path 'runs/b 1'"
    )
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert write_resume_command("runs/a") == "python train.py --configs runs/a/configs.json --load_model_path runs/a"


@pytest.mark.slow
def test_checkpoints_within_epochs_have_their_step(tables, tmp_path, monkeypatch):
    written, original = [], save_checkpoint

    def save(model, path, state, *more):
        written.append((state["epochs_completed"], state["steps_completed"]))
        original(model, path, state, *more)

    monkeypatch.setattr(resuming, "save_checkpoint", save)
    start(**options_of(tables, tmp_path / "run", num_epochs=2, batch_size=4, checkpoint_every_steps=3))
    # Also before the first validation, which may meet an unreadable image.
    assert written == [(0, 3), (0, 6), (0, 7), (1, 0), (1, 3), (1, 6), (2, 0)]
