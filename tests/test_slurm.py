"""Slurm's variables."""

import os

import pytest
from team_settings import STEP, slurm_step

from finetune.options import UserError
from finetune.slurm import take_slurm_step


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        # A batch script has a rank, but no step.
        ({"_STEP_NUM_TASKS": None}, "SLURM_STEP_NUM_TASKS not found in environment. Not running inside a SLURM step?"),
        ({"D_NODENAME": None}, "'SLURMD_NODENAME' is not set"),
        ({"_STEP_NODELIST": "n[1-"}, "Invalid hostlist"),
        ({"_STEP_TASKS_PER_NODE": "3"}, "Requested 1 tasks but only 3 were assigned"),
        ({"D_NODENAME": "n7"}, "'n7:8888' is not in list"),
    ],
)
def test_slurm_variables_that_name_no_workers_are_told_in_one_line(monkeypatch, changed, reason):
    slurm_step(monkeypatch, **{name: value for name, value in (STEP | changed).items() if value is not None})
    with pytest.raises(UserError) as caught:
        take_slurm_step()
    assert f"Slurm's variables do not name the workers: {reason}" in str(caught.value)
    assert "srun" in str(caught.value)
    assert str(caught.value).isprintable()
    assert "TF_CONFIG" not in os.environ
