"""Settings of processes that train together."""

import json
import os
import socket

STEP = {
    "_PROCID": "0",
    "_LOCALID": "0",
    "D_NODENAME": "n1",
    "_STEP_NODELIST": "n1",
    "_STEP_NUM_TASKS": "1",
    "_STEP_TASKS_PER_NODE": "1",
}


def config_of(workers, index, **cluster):
    return json.dumps({"cluster": {"worker": workers, **cluster}, "task": {"type": "worker", "index": index}})


def slurm_step(monkeypatch, **values):
    """Sets the variables that Slurm sets in a task of a step."""
    # Set first, so that it is restored whoever changes it.
    monkeypatch.setenv("TF_CONFIG", "")
    for name in ("TF_CONFIG", "CUDA_VISIBLE_DEVICES", *(name for name in os.environ if name.startswith("SLURM"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM{name}", value)


def free_addresses(number):
    """Returns addresses on this machine whose ports are free."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return [f"127.0.0.1:{port}" for port in ports]
