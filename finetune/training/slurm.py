"""Slurm's variables as TF_CONFIG, which says which processes train together."""

from __future__ import annotations

import json
import os
from typing import Any

import tensorflow as tf

from finetune.core.options import UserError
from finetune.core.texts import shorten

# The port of the first task on each host of a Slurm step; the others have those after it.
SLURM_PORT = 8888


def take_slurm_step(distribution_strategy: str = "multi_worker") -> None:
    """Puts Slurm's variables into TF_CONFIG, where TensorFlow finds them, in a task of a step and unless that is set.

    Raises:
        UserError: they do not name the workers.
    """
    if distribution_strategy == "multi_worker" and "TF_CONFIG" not in os.environ and "SLURM_PROCID" in os.environ:
        os.environ["TF_CONFIG"] = json.dumps(_read_slurm_step())


def _read_slurm_step() -> dict[str, Any]:
    """Returns what TF_CONFIG has to be in a task of a Slurm step; raises UserError where there is none."""
    try:
        # The GPUs stay those that Slurm gives: the resolver would number them from 0, and fails where there are none.
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=SLURM_PORT, gpus_per_node=2**16, gpus_per_task=1, auto_set_gpu=False
        )
        cluster = resolver.cluster_spec().as_dict()
        # Not by rank: the resolver sorts the hosts by name, and Slurm may deal the tasks out in turn.
        own = f"{os.environ['SLURMD_NODENAME']}:{SLURM_PORT + int(os.environ['SLURM_LOCALID'])}"
        return {"cluster": cluster, "task": {"type": "worker", "index": cluster["worker"].index(own)}}
    except (RuntimeError, KeyError, ValueError) as error:
        reason = f"{error} is not set" if isinstance(error, KeyError) else shorten(str(error)).rstrip(".")
        raise UserError(
            f"distribution_strategy multi_worker: Slurm's variables do not name the workers: {reason}. Start train.py "
            "with srun, or set TF_CONFIG. docs/distributed.md shows how."
        ) from error
