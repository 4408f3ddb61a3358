"""Settings of processes that train together."""

import json
import os


def config_of(workers, index, **cluster):
    return json.dumps({"cluster": {"worker": workers, **cluster}, "task": {"type": "worker", "index": index}})


def slurm_step(monkeypatch, **values):
    """Sets what Slurm sets in a task of a step."""
    # To be put back as it was, whoever sets it.
    monkeypatch.setenv("TF_CONFIG", "")
    for name in ("TF_CONFIG", "CUDA_VISIBLE_DEVICES", *(name for name in os.environ if name.startswith("SLURM"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM{name}", value)


STEP = {"_PROCID": "0", "_LOCALID": "0", "D_NODENAME": "n1", "_STEP_NODELIST": "n1"}


STEP |= {"_STEP_NUM_TASKS": "1", "_STEP_TASKS_PER_NODE": "1"}
