"""Checkpoints are written when they are due."""

import pytest
from small_runs import (
    options_of,
    start,
    tables,  # noqa: F401
)

from finetune.training import checkpoint_writer
from finetune.training.training_state import save_checkpoint


@pytest.mark.slow
def test_checkpoints_within_epochs_have_their_step(tables, tmp_path, monkeypatch):
    written, original = [], save_checkpoint

    def save(model, path, state, *more):
        written.append((state["epochs_completed"], state["steps_completed"]))
        original(model, path, state, *more)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save)
    start(**options_of(tables, tmp_path / "run", num_epochs=2, checkpoint_every_steps=3))
    # Also before the first validation, which may meet an unreadable image.
    assert written == [(0, 3), (0, 6), (0, 7), (1, 0), (1, 3), (1, 6), (2, 0)]
