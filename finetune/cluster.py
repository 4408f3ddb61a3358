"""Which processes train together, by TF_CONFIG."""

from __future__ import annotations

import json
import os
import re

from finetune.options import UserError
from finetune.texts import shorten

ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}")


def read_cluster() -> tuple[list[str], int]:
    """Reads from TF_CONFIG which processes train together.

    Returns:
        The address, host:port, of each worker, the chief's first; and the position of this process among them.

    Raises:
        UserError: it is not set, or not what TensorFlow expects.
    """
    expected = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'
    text = os.environ.get("TF_CONFIG", "")
    try:
        content = json.loads(text)
        cluster, task = content["cluster"], content["task"]
        addresses = [*cluster.get("chief", []), *cluster.get("worker", [])]
        index = task["index"] + (len(cluster.get("chief", [])) if task["type"] == "worker" else 0)
        is_right = cluster.keys() <= {"chief", "worker"} and len(cluster.get("chief", addresses[:1])) == 1
        is_right = is_right and type(task["index"]) is int and 0 <= task["index"] < len(cluster[task["type"]])
        is_right = is_right and len(set(addresses)) == len(addresses) and all(map(ADDRESS.fullmatch, addresses))
        is_right = is_right and all(0 < int(address.rpartition(":")[2]) < 2**16 for address in addresses)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_right = False
    if not is_right:
        raise UserError(
            f"distribution_strategy multi_worker: expected TF_CONFIG to be like {expected}, the same cluster and "
            f"another index in every process, or a Slurm step. Received: {shorten(text) if text else 'nothing'}. "
            "docs/distributed.md shows how to start."
        )
    return addresses, index
