"""Processes that train together: real ones on this machine, which talk over real connections, without TensorFlow."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from team_settings import STEP, config_of, slurm_step

from finetune.core.options import UserError
from finetune.training import workers as teams
from finetune.training.slurm import SLURM_PORT, take_slurm_step
from finetune.training.workers import (
    LOST_AFTER_SECONDS,
    OWN_OPTIONS,
    PING_SECONDS,
    WAIT_SECONDS,
    join_team,
    read_cluster,
)

ADDRESSES = ["a:2222", "b:2222", "c:2222"]
PROJECT = str(Path(teams.__file__).resolve().parents[2])
# BODY is what a process does as one of the team, TIMES are other values of the seconds in finetune.training.workers.
PROGRAM = """
import json, os, signal, sys, time
from configs import Configs
from finetune.training import workers as teams
from finetune.core.options import UserError, run_script

vars(teams).update(json.loads(os.environ["TIMES"]))

def show(value):
    print(json.dumps(value), file=sys.stderr, flush=True)

def main(configs: Configs):
    folder = configs.load_model_path or configs.save_model_path
    with teams.join_team(configs.distribution_strategy, configs.to_dict(), folder) as team:
        exec(os.environ["BODY"])

run_script(main)
"""
# Its end has no output to flush: there is none, or nobody reads it.
ENDS = """
import os, sys
from finetune.training.workers import end_at_once
class Broken:
    def flush(self):
        raise BrokenPipeError
sys.stdout, sys.stderr = None, Broken()
end_at_once(7)
os._exit(1)
"""
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")


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


def free_addresses(number):
    """Returns addresses on this machine whose ports nobody has."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return [f"127.0.0.1:{port}" for port in ports]


class Processes:
    """Starts processes of a team, and kills what is left of them."""

    def __init__(self):
        self.started = []

    def start(self, addresses, index, body="", options=(), **times):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {"TF_CONFIG": config_of(addresses, index), "BODY": body, "TIMES": json.dumps(times)}
        words = [sys.executable, "-c", PROGRAM, "--distribution_strategy", "multi_worker", *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.started.append(subprocess.Popen(words, cwd=PROJECT, env=environment, **pipes))
        return self.started[-1]

    def run(self, number, body="", addresses=None, **times):
        """Runs a whole team to its end: of each its exit status and what it wrote."""
        addresses = addresses or free_addresses(number)
        started = [self.start(addresses, index, body, **times) for index in range(number)]
        return addresses, [finish(process) for process in started]

    def end(self):
        for process in self.started:
            process.kill()
            process.communicate()


def finish(process):
    """Waits for a process: far longer than any should take, and far shorter than those sleep that hang."""
    out, err = process.communicate(timeout=120)
    return SimpleNamespace(status=process.returncode, out=out.split("\n")[:-1], err=[*filter(None, err.split("\n"))])


@pytest.fixture
def processes():
    started = Processes()
    yield started
    started.end()


def connect(address):
    """Connects with a chief as soon as it listens."""
    host, _, port = address.rpartition(":")
    for _ in range(400):
        try:
            return socket.create_connection((host, int(port)), timeout=60)
        except OSError:
            time.sleep(0.05)
    pytest.fail("nobody listens")


def say_hello(addresses, index):
    """Comes to the chief as a worker does, and returns the connection."""
    peer = connect(addresses[0])
    peer.sendall(json.dumps({"hello": {"index": index, "addresses": addresses}}).encode() + b"\n")
    return peer


# Which processes there are


@pytest.mark.parametrize("strategy", ["none", "mirrored"])
def test_one_process_is_a_team_that_asks_nobody(monkeypatch, strategy):
    monkeypatch.setenv("TF_CONFIG", "no JSON")
    with join_team(strategy, {}, "") as team:
        assert (team.size, team.index, team.is_chief) == (1, 0, True)
        assert team.exchange({"any": 1}) == [{"any": 1}]
        team.agree({"any": object()})
    with pytest.raises(ZeroDivisionError), team:
        _ = 1 / 0


# Coming together


def test_values_come_in_the_order_of_the_workers_and_the_chief_alone_prints(processes):
    body = "time.sleep(0.1 * (2 - team.index)); print('hello')\n"
    body += "for round in (1, 2): show(team.exchange({'index': team.index, 'round': [round, None, 'é']}))\n"
    body += "show(team.exchange(None)); team.agree({'x': (1, 2)})"
    addresses, found = processes.run(3, body)
    expected = [[{"index": index, "round": [round, None, "é"]} for index in range(3)] for round in (1, 2)]
    for index, worker in enumerate(found):
        assert worker.status == 0
        assert [json.loads(line) for line in worker.err] == [*expected, [None] * 3]
        joined = f"Worker {index} of 3. The chief, {addresses[0]}, prints and writes."
        assert worker.out == [joined, *["hello"] * (index == 0)]


def test_other_options_are_named_by_all_in_the_same_line(processes):
    addresses = free_addresses(3)
    given = [[], [], ["--learning_rate", "0.5", "--batch_size", "8", "--image_target_size", "64", "64", "3"]]
    started = [processes.start(addresses, index, options=options) for index, options in enumerate(given)]
    expected = (
        "Error: The workers do not start with the same: image_target_size is [64, 64, 3] for worker 2 "
        f"({addresses[2]}) and [224, 224, 3] for the chief. Give both the same."
    )
    for process in started:
        worker = finish(process)
        assert (worker.status, worker.err) == (2, [expected])


def test_what_belongs_to_a_host_may_differ(processes):
    addresses = free_addresses(2)
    options = ["--image_directory", "/mnt/photos", "--train_csv", "t.csv", "--test_csv", "v.csv", "--validation_csv"]
    options += ["w.csv", "--load_model_path", "old", "--save_model_path", "new", "--generator_workers", "9"]
    options += ["--image_cache", "disk", "--gpu_percentage", "0.5"]
    started = [processes.start(addresses, 0), processes.start(addresses, 1, options=options)]
    assert [(worker.status, worker.err) for worker in map(finish, started)] == [(0, []), (0, [])]


def test_other_values_during_the_start_are_named_by_all(processes):
    addresses, found = processes.run(3, "team.agree({'images': 7, 'devices': team.index // 2})\ntime.sleep(60)")
    line = f"Error: The workers do not start with the same: devices is 1 for worker 2 ({addresses[2]}) and 0 for the "
    assert [(worker.status, worker.err) for worker in found] == [(2, [f"{line}chief. Give both the same."])] * 3


def test_workers_that_name_other_workers_are_refused(processes):
    addresses = free_addresses(3)
    chief = processes.start(addresses, 0)
    waiting = say_hello(addresses, 2)
    worker = processes.start(addresses[:2], 1)
    expected = (
        f"TF_CONFIG names the workers {addresses} for the chief and {addresses[:2]} for worker 1. Correct TF_CONFIG."
    )
    for process in (chief, worker):
        found = finish(process)
        assert (found.status, found.err) == (2, [f"Error: {expected}"])
    assert json.loads(waiting.makefile().readline()) == {"end": expected, "status": 2}


def test_two_processes_of_one_index_are_refused(processes):
    addresses = free_addresses(3)
    chief = processes.start(addresses, 0)
    first = say_hello(addresses, 1)
    second = processes.start(addresses, 1)
    expected = f"TF_CONFIG: two processes say that they are worker 1 ({addresses[1]}). Correct TF_CONFIG."
    for process in (chief, second):
        found = finish(process)
        assert (found.status, found.err) == (2, [f"Error: {expected}"])
    assert json.loads(first.makefile().readline()) == {"end": expected, "status": 2}


def test_a_worker_that_is_started_again_while_the_others_wait_takes_its_place(processes):
    addresses = free_addresses(3)
    chief = processes.start(addresses, 0, "show(team.exchange(team.index))")
    with say_hello(addresses, 1):
        pass
    workers = [processes.start(addresses, index, "team.exchange(team.index)") for index in (1, 2)]
    assert [(worker.status, worker.err) for worker in map(finish, (chief, *workers))] == [
        (0, ["[0, 1, 2]"]),
        (0, []),
        (0, []),
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_a_port_in_use_is_named(processes, index):
    addresses = free_addresses(2)
    port = int(addresses[index].rpartition(":")[2])
    with socket.create_server(("", port)):
        found = finish(processes.start(addresses, index))
    assert found.status == 2
    assert found.err == [
        f"Error: Port {port}, of worker {index} ({addresses[index]}) in TF_CONFIG, cannot be used on this host: "
        "Address already in use. End the program that has it, or choose another port for all workers."
    ]


def test_a_worker_that_does_not_come_is_named_to_those_that_wait(processes):
    addresses = free_addresses(4)
    chief = processes.start(addresses, 0, WAIT_SECONDS=1)
    waiting = say_hello(addresses, 2)
    expected = (
        f"worker 1 ({addresses[1]}), worker 3 ({addresses[3]}) did not come to the chief at {addresses[0]} within "
        "1 seconds. Start train.py on every host of TF_CONFIG, with its own index."
    )
    found = finish(chief)
    assert (found.status, found.err) == (2, [f"Error: {expected}"])
    assert json.loads(waiting.makefile().readline()) == {"end": expected, "status": 2}


def test_a_chief_that_does_not_come_is_named(processes):
    addresses = free_addresses(2)
    found = finish(processes.start(addresses, 1, WAIT_SECONDS=0.5))
    assert found.status == 2
    assert found.err == [
        f"Error: The chief, worker 0 ({addresses[0]}), did not answer within 0 seconds: Connection refused. Start "
        "train.py there too, and let its port be reached from here."
    ]


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\x00\x12\x04\xff\n", b"5\n", b"[" * 9999]
)
def test_a_chief_that_is_none_is_told(processes, answer):
    addresses = free_addresses(2)
    with socket.create_server(("127.0.0.1", int(addresses[0].rpartition(":")[2]))) as server:
        process = processes.start(addresses, 1)
        peer, _ = server.accept()
        with peer:
            peer.makefile("rb").readline()
            peer.sendall(answer)
    found = finish(process)
    assert found.status == 2
    assert len(found.err) == 1
    assert found.err[0].startswith(
        f"Error: The chief at {addresses[0]} has ended, or what answers there is no train.py"
    )


def test_strangers_at_the_chiefs_port_are_sent_away(processes):
    addresses = free_addresses(2)
    hello = {"index": 1, "addresses": addresses}
    wrong = [
        {"index": "x"},
        {"index": 0},
        {"index": 2},
        {"index": -1},
        {"index": None},
        {"addresses": 5},
        {"addresses": []},
    ]
    said = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\n", b"[]\n", b"{}\n", b"[" * 9999 + b"\n", b"\n", b""]
    said += [b'{"hello": {"index": 1e999, "addresses": []}}\n', b'{"hello": {"index": 1, "addr']
    said += [json.dumps({"hello": hello | change}).encode() + b"\n" for change in wrong]
    chief = processes.start(addresses, 0, PING_SECONDS=0.1)
    for words in said:
        with connect(addresses[0]) as peer:
            peer.sendall(words)
    silent = [connect(addresses[0]) for _ in range(3)]
    worker = processes.start(addresses, 1)
    assert [(found.status, found.err) for found in map(finish, (chief, worker))] == [(0, []), (0, [])]
    assert [peer.recv(1) for peer in silent] == [b""] * 3


# What one tells the others


def stops(addresses, index):
    """What the others of a run in saved_model say of a worker that is gone."""
    return (
        f"Error: Worker {index} ({addresses[index]}) was killed or cannot be reached any more. Every worker stops. "
        "Start them all again with --load_model_path saved_model: training goes on after the last checkpoint."
    )


@posix
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(processes, victim):
    body = "team.exchange(0)\n"
    body += f"if team.index == {victim}: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"
    addresses, found = processes.run(3, body)
    assert found.pop(victim).status == -signal.SIGKILL
    assert [(worker.status, worker.err) for worker in found] == [(1, [stops(addresses, victim)])] * 2


@posix
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_ends_the_others_and_ends_when_it_wakes(processes, victim):
    body = "team.exchange(0)\n"
    body += f"if team.index == {victim}: os.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(600)"
    addresses, times = free_addresses(3), {"LOST_AFTER_SECONDS": 4, "PING_SECONDS": 0.3}
    started = [processes.start(addresses, index, body, **times) for index in range(3)]
    frozen = started.pop(victim)
    assert [(x.status, x.err) for x in map(finish, started)] == [(1, [stops(addresses, victim)])] * 2
    os.kill(frozen.pid, signal.SIGCONT)
    assert finish(frozen).status == 1


@pytest.mark.parametrize(
    ("raising", "error", "status", "own", "told"),
    [
        (1, "UserError('photo.jpg is damaged.')", 2, "Error: photo.jpg is damaged.", "photo.jpg is damaged."),
        (0, "UserError('Two faults:\\none\\ntwo')", 2, "two", "Two faults:"),
        (1, "ZeroDivisionError('x')", 1, "ZeroDivisionError: x", "ZeroDivisionError, as its own output tells"),
        (0, "ZeroDivisionError('x')", 1, "ZeroDivisionError: x", "ZeroDivisionError, as its own output tells"),
        (1, "KeyboardInterrupt", 130, "Interrupted.", "it was interrupted"),
    ],
    ids=["mistake", "mistakes", "bug", "bug of the chief", "interrupt"],
)
def test_an_error_in_one_process_is_one_line_in_the_others(processes, raising, error, status, own, told):
    body = f"team.exchange(0)\nif team.index == {raising}: raise {error}\ntime.sleep(600)"
    addresses, found = processes.run(3, body)
    failed = found.pop(raising)
    assert (failed.status, failed.err[-1]) == (status, own)
    assert ("Traceback (most recent call last):" in failed.err) == (status == 1)
    line = f"Error: Worker {raising} ({addresses[raising]}) has stopped: {told}"
    assert [(worker.status, worker.err) for worker in found] == [(status, [line])] * 2


@posix
def test_what_tensorflow_makes_of_a_killed_process_is_told_as_that(processes):
    body = "class Unavailable(Exception): __module__ = 'tensorflow.errors'\nteam.exchange(0)\n"
    body += "if team.index == 1: time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)\nraise Unavailable"
    addresses, found = processes.run(3, body)
    del found[1]
    assert [(worker.status, worker.err) for worker in found] == [(1, [stops(addresses, 1)])] * 2


@pytest.mark.parametrize(("error", "status"), [("UserError('no images')", 2), ("ZeroDivisionError", 1)])
def test_the_same_error_in_all_processes_ends_all_of_them(processes, error, status):
    _, found = processes.run(3, f"raise {error}")
    assert [worker.status for worker in found] == [status] * 3
    if status == 2:
        # Each tells its own, or has been told of another's before.
        assert all(len(worker.err) == 1 and worker.err[0].endswith("no images") for worker in found)


@pytest.mark.parametrize("seconds", [0.5, pytest.param(6, marks=pytest.mark.slow)])
def test_all_leave_together_however_long_one_takes(processes, seconds):
    times = {"LOST_AFTER_SECONDS": 3, "PING_SECONDS": 0.2}
    _, found = processes.run(3, f"time.sleep({seconds} * (team.index == 1))\nprint('done')", **times)
    assert [(worker.status, worker.err) for worker in found] == [(0, [])] * 3
    assert found[0].out[-1] == "done"


def test_a_signal_that_all_have_agreed_on_is_the_exit_status_of_all(processes):
    _, found = processes.run(2, "raise SystemExit(143)")
    assert [(worker.status, worker.err) for worker in found] == [(143, [])] * 2


@pytest.mark.parametrize("ended", [0, 1])
def test_a_process_that_has_nothing_to_do_while_others_have_is_told(processes, ended):
    _, found = processes.run(3, f"if team.index != {ended}: team.agree({{'images': 5}})")
    assert [worker.status for worker in found] == [2] * 3
    for worker in found:
        assert len(worker.err) == 1
        assert "Give every worker the same model to continue from." in worker.err[0]
        assert "to do, and the chief has" in worker.err[0]


# The manual


def test_the_manual_says_what_the_code_does():
    with open(os.path.join(PROJECT, "docs", "distributed.md"), encoding="utf-8") as file:
        manual = file.read()
    own = manual[manual.index("The same code, packages and options") : manual.index("The same tables")]
    assert set(own.split("`")[1::2]) == OWN_OPTIONS
    for words in (f"up to {WAIT_SECONDS:.0f} seconds", f"| {LOST_AFTER_SECONDS:.0f} s |"):
        assert words in manual
    assert f"port {SLURM_PORT} for the first task on a host, {SLURM_PORT + 1} for the second" in manual
    assert f"{2 * PING_SECONDS:.0f} s if raised by TensorFlow" in manual


def test_a_process_without_output_ends_at_once():
    ended = subprocess.run([sys.executable, "-c", ENDS], cwd=PROJECT, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (7, b"")
