"""Checkpoints are written whole, and when they are due."""

from small_runs import (
    options_of,
    start,
    tables,  # noqa: F401
)

from finetune import checkpoints
from finetune.training_state import save_checkpoint


def test_checkpoints_between_epochs_carry_their_step(tables, tmp_path, monkeypatch):

    written = []
    original = save_checkpoint

    def save(model, path, state):
        written.append((state["epochs_completed"], state["steps_completed"]))
        original(model, path, state)

    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    start(**options_of(tables, tmp_path / "run", num_epochs=2, checkpoint_every_steps=3))
    assert written == [(0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (2, 0)]
