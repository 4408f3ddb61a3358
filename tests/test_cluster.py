"""TF_CONFIG."""

import json
import os

import pytest
from team_settings import STEP, config_of, slurm_step

from finetune.cluster import read_cluster
from finetune.options import UserError
from finetune.slurm import take_slurm_step

ADDRESSES = ["a:2222", "b:2222", "c:2222"]


@pytest.mark.parametrize(
    ("cluster", "task", "expected"),
    [
        ({"worker": ADDRESSES}, ("worker", 0), (ADDRESSES, 0)),
        ({"worker": ADDRESSES}, ("worker", 2), (ADDRESSES, 2)),
        ({"chief": ["z:1"], "worker": ADDRESSES}, ("chief", 0), (["z:1", *ADDRESSES], 0)),
        ({"chief": ["z:1"], "worker": ADDRESSES}, ("worker", 0), (["z:1", *ADDRESSES], 1)),
        ({"chief": ["z:1"]}, ("chief", 0), (["z:1"], 0)),
        ({"worker": ["10.0.0.1:65535", "[::1]:1"]}, ("worker", 1), (["10.0.0.1:65535", "[::1]:1"], 1)),
    ],
)
def test_the_chief_comes_first_and_workers_in_their_order(monkeypatch, cluster, task, expected):
    content = {"cluster": cluster, "task": dict(zip(("type", "index"), task, strict=True)), "environment": "cloud"}
    monkeypatch.setenv("TF_CONFIG", json.dumps(content))
    assert read_cluster() == expected


WRONG = {
    "empty": "",
    "no JSON": "{'cluster': {}}",
    "a list": "[]",
    "too deep": "[" * 100_000,
    "no cluster": '{"task": {"type": "worker", "index": 0}}',
    "no task": json.dumps({"cluster": {"worker": ADDRESSES}}),
    "no workers": json.dumps({"cluster": {}, "task": {"type": "worker", "index": 0}}),
    "a list of workers alone": json.dumps({"cluster": ADDRESSES, "task": {"type": "worker", "index": 0}}),
    "an address in the place of a list": config_of("12", 0),
    "index past the end": config_of(ADDRESSES, 3),
    "negative index": config_of(ADDRESSES, -1),
    "index as text": config_of(ADDRESSES, "1"),
    "index true": config_of(ADDRESSES, True),
    "no index": json.dumps({"cluster": {"worker": ADDRESSES}, "task": {"type": "worker"}}),
    "parameter servers": config_of(ADDRESSES, 0, ps=["d:2222"]),
    "an evaluator": config_of(ADDRESSES, 0, evaluator=["d:2222"]),
    "two chiefs": config_of(ADDRESSES, 0, chief=["d:2222", "e:2222"]),
    "an empty list of chiefs": config_of(ADDRESSES, 0, chief=[]),
    "this process evaluates": json.dumps({"cluster": {"worker": ADDRESSES}, "task": {"type": "evaluator", "index": 0}}),
    "one address twice": config_of(["a:2222", "b:2222", "a:2222"], 0),
    "no port": config_of(["a:2222", "b"], 0),
    "no host": config_of(["a:2222", ":2222"], 0),
    "port 0": config_of(["a:2222", "b:0"], 0),
    "a port above 65535": config_of(["a:2222", "b:65536"], 0),
    "a name for a port": config_of(["a:2222", "b:http"], 0),
    "a URL": config_of(["a:2222", "grpc://b:2222"], 0),
    "a number for an address": config_of(["a:2222", 5], 0),
}


@pytest.mark.parametrize("text", [None, *WRONG.values()], ids=["missing", *WRONG])
def test_a_wrong_tf_config_is_told_in_one_line(monkeypatch, text):
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError) as caught:
        read_cluster()
    message = str(caught.value)
    assert '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}' in message
    assert f"Received: {text[:60] if text else 'nothing'}" in message
    assert "docs/distributed.md" in message
    assert message.isprintable()
    assert len(message) < 800


@pytest.mark.parametrize(
    ("hosts", "tasks", "own", "addresses", "index"),
    [
        ("n[1-2]", "1(x2)", ("1", "n2", "0"), ["n1:8888", "n2:8888"], 1),
        ("n[1-2]", "2(x2)", ("2", "n2", "0"), ["n1:8888", "n1:8889", "n2:8888", "n2:8889"], 2),
        # Tasks that are dealt out in turn: the second one is the first on the second host.
        ("n[1-2]", "2(x2)", ("1", "n2", "0"), ["n1:8888", "n1:8889", "n2:8888", "n2:8889"], 2),
        # As text, n10 comes before n9.
        ("n[9-10]", "1(x2)", ("0", "n9", "0"), ["n10:8888", "n9:8888"], 1),
        ("a,b[07-08]", "2,1(x2)", ("3", "b08", "0"), ["a:8888", "a:8889", "b07:8888", "b08:8888"], 3),
        ("n1", "1", ("0", "n1", "0"), ["n1:8888"], 0),
    ],
)
def test_a_slurm_step_names_its_workers(monkeypatch, hosts, tasks, own, addresses, index):
    rank, host, place = own
    number = str(len(addresses))
    step = {"_STEP_NODELIST": hosts, "_STEP_TASKS_PER_NODE": tasks, "_STEP_NUM_TASKS": number, "_NTASKS": number}
    slurm_step(monkeypatch, _PROCID=rank, _LOCALID=place, D_NODENAME=host, **step)
    take_slurm_step()
    assert read_cluster() == (addresses, index)
    # Where TensorFlow looks for it.
    expected = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    assert json.loads(os.environ["TF_CONFIG"]) == expected
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_tf_config_wins_over_slurm(monkeypatch):
    slurm_step(monkeypatch, **STEP)
    monkeypatch.setenv("TF_CONFIG", config_of(ADDRESSES, 1))
    take_slurm_step()
    assert read_cluster() == (ADDRESSES, 1)
