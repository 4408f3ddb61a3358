"""Processes that train together: real ones on this machine, which talk through TensorFlow's collectives."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time  # noqa: F401 - for the bodies
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tensorflow as tf
from loaded_processes import LoadedProcess
from team_settings import STEP, config_of, free_addresses, slurm_step

from configs import Configs
from finetune.core.devices import start_devices
from finetune.core.options import UserError
from finetune.core.scripts import run_script
from finetune.training import workers as teams
from finetune.training.workers import (
    OWN_OPTIONS,
    SLURM_PORT,
    WAIT_SECONDS,
    WATCH_SECONDS,
    Team,
    describe_code,
    end_at_once,
    join_team,
    read_cluster,
    select_common,
    take_slurm_step,
)

ADDRESSES = ["a:2222", "b:2222", "c:2222"]
PROJECT = str(Path(teams.__file__).resolve().parents[2])
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")


def show(value):
    print(json.dumps(value), file=sys.stderr, flush=True)


def work(body, options, times):
    """Does what a script does as one of a team: BODY, which knows `team`; TIMES replace seconds in workers.py."""

    def main(configs: Configs):
        vars(teams).update(times)
        folder = configs.load_model_path or configs.save_model_path
        with join_team(configs.distribution_strategy, configs.to_dict(), folder) as team:
            team.connect(start_devices(1, configs.distribution_strategy))
            exec(body, globals() | {"team": team})

    sys.argv = ["train.py", "--distribution_strategy", "multi_worker", *options]
    run_script(main)


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
    "no task": json.dumps({"cluster": {"worker": ADDRESSES}}),
    "no workers": json.dumps({"cluster": {}, "task": {"type": "worker", "index": 0}}),
    "an address instead of a list": config_of("12", 0),
    "index past the end": config_of(ADDRESSES, 3),
    "negative index": config_of(ADDRESSES, -1),
    "index true": config_of(ADDRESSES, True),
    "parameter servers": config_of(ADDRESSES, 0, ps=["d:2222"]),
    "two chiefs": config_of(ADDRESSES, 0, chief=["d:2222", "e:2222"]),
    "an empty list of chiefs": config_of(ADDRESSES, 0, chief=[]),
    "one address twice": config_of(["a:2222", "b:2222", "a:2222"], 0),
    "no port": config_of(["a:2222", "b"], 0),
    "no host": config_of(["a:2222", ":2222"], 0),
    "port 0": config_of(["a:2222", "b:0"], 0),
    "a port above 65535": config_of(["a:2222", "b:65536"], 0),
    "a URL": config_of(["a:2222", "grpc://b:2222"], 0),
    "a number for an address": config_of(["a:2222", 5], 0),
}


@pytest.mark.parametrize("text", [None, *WRONG.values()], ids=["missing", *WRONG])
def test_a_wrong_tf_config_ends_in_one_line(monkeypatch, text):
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError) as caught:
        read_cluster()
    message = str(caught.value)
    assert f"Received: {text[:60] if text else 'nothing'}" in message
    assert "docs/distributed.md" in message
    assert message.isprintable()
    assert len(message) < 800


@pytest.mark.parametrize(
    ("hosts", "tasks", "own", "addresses", "index"),
    [
        ("n[1-2]", "1(x2)", ("1", "n2", "0"), ["n1:8888", "n2:8888"], 1),
        ("n[1-2]", "2(x2)", ("2", "n2", "0"), ["n1:8888", "n1:8889", "n2:8888", "n2:8889"], 2),
        # Tasks distributed in turn: the second one is the first on the second host.
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
def test_slurm_variables_without_workers_end_in_one_line(monkeypatch, changed, reason):
    slurm_step(monkeypatch, **{name: value for name, value in (STEP | changed).items() if value is not None})
    with pytest.raises(UserError) as caught:
        take_slurm_step()
    assert reason in str(caught.value)
    assert "srun" in str(caught.value)
    assert str(caught.value).isprintable()
    assert "TF_CONFIG" not in os.environ


class Processes:
    """Starts processes of a team, and kills those that are left."""

    def __init__(self, folder):
        self.folder, self.started = folder, []

    def start(self, addresses, index, body="", options=(), **times):
        path = self.folder / f"worker_{len(self.started)}"
        process = LoadedProcess(path, work, body, options, times, TF_CONFIG=config_of(addresses, index))
        self.started.append(process)
        return process

    def run(self, number, body="", **times):
        """Runs a whole team to its end; returns the addresses, and each exit status and outputs."""
        addresses = free_addresses(number)
        started = [self.start(addresses, index, body, **times) for index in range(number)]
        return addresses, [finish(process) for process in started]


def finish(process):
    """Waits for a process: far longer than any should take, and far shorter than those sleep that hang."""
    out, err = process.communicate(timeout=240)
    # Without TensorFlow's own lines about missing GPUs.
    lines = [line for line in err.split("\n") if line and not re.match(r"[EWI]\d{4} 0", line)]
    return SimpleNamespace(status=process.returncode, out=out.split("\n")[:-1], err=lines)


@pytest.fixture
def processes(tmp_path):
    started = Processes(tmp_path)
    yield started
    for process in started.started:
        process.kill()


@pytest.mark.parametrize("strategy", ["none", "mirrored"])
def test_one_process_is_a_team(monkeypatch, strategy):
    monkeypatch.setenv("TF_CONFIG", "no JSON")
    with join_team(strategy, {}, "") as team:
        team.connect(None)
        assert (team.size, team.index, team.is_chief) == (1, 0, True)
        assert team.exchange({"any": 1}) == [{"any": 1}]
        team.check_workers_match({"any": object()})
    with pytest.raises(ZeroDivisionError), team:
        _ = 1 / 0


@pytest.mark.parametrize("index", [0, 2])
def test_missing_workers_are_named(monkeypatch, index):
    addresses = free_addresses(4)
    monkeypatch.setenv("TF_CONFIG", config_of(addresses, index))
    monkeypatch.setattr(teams, "WAIT_SECONDS", 0.2)
    missing, there = [other for other in (0, 2, 3) if other != index], addresses[1]
    with socket.create_server(("127.0.0.1", int(there.rpartition(":")[2]))), pytest.raises(UserError) as caught:
        join_team("multi_worker", {}, "").__enter__()
    for other in missing:
        assert f"worker {other} ({addresses[other]})" in str(caught.value)
    assert there not in str(caught.value)


def test_a_port_in_use_is_named(monkeypatch):
    addresses = free_addresses(2)
    port = int(addresses[1].rpartition(":")[2])
    monkeypatch.setenv("TF_CONFIG", config_of(addresses, 1))
    with socket.create_server(("", port)), pytest.raises(UserError) as caught:
        join_team("multi_worker", {}, "").__enter__()
    assert f"Port {port}, of worker 1 ({addresses[1]})" in str(caught.value)


@pytest.mark.slow
def test_another_program_at_an_address_is_not_waited_for_endlessly(processes):
    addresses = free_addresses(2)
    with socket.create_server(("127.0.0.1", int(addresses[1].rpartition(":")[2]))):
        found = finish(processes.start(addresses, 0, WAIT_SECONDS=5))
    assert found.status == 1
    assert any("Timeout" in line for line in found.err)


@pytest.mark.slow
def test_values_are_in_the_order_of_the_workers_and_only_the_chief_prints(processes):
    body = "time.sleep(0.1 * (1 - team.index)); print('hello')\n"
    body += "for round in (1, 2): show(team.exchange({'it': [round, team.index, None, 'é'] * (2 * team.index + 1)}))\n"
    body += (
        "show(team.exchange(None)); team.check_workers_match({'x': (1, 2)}); show(len(team.exchange('x' * 100_000)[1]))"
    )
    addresses, found = processes.run(2, body)
    expected = [[{"it": [round, i, None, "é"] * (2 * i + 1)} for i in range(2)] for round in (1, 2)]
    for index, worker in enumerate(found):
        assert worker.status == 0
        assert [json.loads(line) for line in worker.err] == [*expected, [None] * 2, 100_000]
        joined = f"Worker {index} of 2. The chief, {addresses[0]}, prints and writes."
        assert worker.out[0] == joined
        assert worker.out[-1] == ("hello" if index == 0 else joined)


@pytest.mark.slow
def test_all_workers_name_an_option_that_differs(processes):
    addresses = free_addresses(2)
    given = [[], ["--learning_rate", "0.5", "--image_target_size", "64", "64", "3"]]
    started = [processes.start(addresses, index, options=options) for index, options in enumerate(given)]
    for process in started:
        worker = finish(process)
        assert (worker.status, len(worker.err)) == (2, 1)
        assert f"image_target_size is [64, 64, 3] for worker 1 ({addresses[1]}) and [224, 224, 3]" in worker.err[0]


def test_options_of_a_host_may_differ():
    own = {"train_csv": "t.csv", "save_model_path": "new", "generator_workers": 9, "gpu_percentage": 0.5}
    assert select_common(Configs(**own).to_dict()) == select_common(Configs().to_dict())
    assert select_common(Configs(batch_size=5).to_dict()) != select_common(Configs().to_dict())


def test_other_code_is_other_settings(monkeypatch, tmp_path):
    (tmp_path / "finetune" / "core").mkdir(parents=True)
    for name in (*teams.ROOT_MODULES, "finetune/core/part.py", "notes.py"):
        (tmp_path / name).write_text("a = 1")
    monkeypatch.setattr(teams, "PROJECT", tmp_path)
    before = describe_code()
    (tmp_path / "notes.py").write_text("a = 2")
    assert describe_code() == before
    (tmp_path / "finetune" / "core" / "part.py").write_text("a = 2")
    assert {name for name, value in describe_code().items() if value != before[name]} == {"the code"}


def check_named(worker, addresses, lost):
    """Checks that a worker of a run in saved_model names the one that has ended, and how to continue."""
    assert worker.status == 1
    lines = [line for line in worker.err if line.startswith("Error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"Error: Worker {lost} ({addresses[lost]}) has ended")
    assert "--load_model_path saved_model" in lines[0]
    assert not any("Traceback" in line for line in worker.err)


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "victim", "then"),
    [
        (3, 1, "team.exchange(1)"),
        (2, 0, "time.sleep(600)"),
    ],
)
def test_a_killed_process_ends_the_others(processes, number, victim, then):
    body = f"team.exchange(0)\nif team.index == {victim}: os.kill(os.getpid(), signal.SIGKILL)\n{then}"
    addresses, found = processes.run(number, body, WATCH_SECONDS=0.5)
    assert found.pop(victim).status == -signal.SIGKILL
    for worker in found:
        check_named(worker, addresses, victim)


def test_a_killed_worker_that_still_listens_is_named(monkeypatch, capsys):
    monkeypatch.setattr(teams, "end_at_once", sys.exit)
    address, *_ = free_addresses(1)
    team = Team([ADDRESSES[0], address], 0, folder="saved_model")
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as listening:
        threading.Timer(0.3, listening.close).start()
        error = tf.errors.UnavailableError(None, None, "aborted by: Socket closed")
        with pytest.raises(SystemExit):
            team.__exit__(type(error), error, None)
    assert f"Error: Worker 1 ({address}) has ended" in capsys.readouterr().err


@posix
@pytest.mark.slow
def test_a_frozen_process_ends_the_others(processes):
    body = "team.exchange(0)\nif team.index == 0: os.kill(os.getpid(), signal.SIGSTOP)\nteam.exchange(1)"
    addresses = free_addresses(2)
    found = finish([processes.start(addresses, index, body) for index in range(2)][1])
    assert found.status == 1
    assert sum("a worker" in line.lower() and "has ended" in line for line in found.err) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raising", "error", "status", "own"),
    [
        (1, "UserError('photo.jpg is damaged.')", 2, "Error: photo.jpg is damaged."),
        (0, "ZeroDivisionError('x')", 1, "ZeroDivisionError: x"),
    ],
    ids=["mistake", "bug of the chief"],
)
def test_an_error_in_one_process_ends_the_others(processes, raising, error, status, own):
    body = f"team.exchange(0)\nif team.index == {raising}: raise {error}\nteam.exchange(1)"
    addresses, found = processes.run(2, body)
    failed = found.pop(raising)
    assert (failed.status, own in failed.err) == (status, True)
    assert ("Traceback (most recent call last):" in failed.err) == (status == 1)
    check_named(found[0], addresses, raising)


@pytest.mark.slow
def test_all_leave_together_with_the_signal_that_they_have_agreed_on(processes):
    body = "time.sleep(3 * team.index); raise SystemExit(143)"
    _, found = processes.run(2, body, WATCH_SECONDS=0.5)
    assert [(worker.status, worker.err) for worker in found] == [(143, [])] * 2


def test_the_manual_agrees_with_the_code():
    manual = Path(PROJECT, "docs", "distributed.md").read_text("utf-8")
    own = manual[manual.index("The same code, packages and options") : manual.index("The same tables")]
    assert set(own.split("`")[1::2]) == OWN_OPTIONS
    for value in (f"{WAIT_SECONDS:.0f} seconds", f"{2 * WATCH_SECONDS:.0f} s", f"{SLURM_PORT}", f"{SLURM_PORT + 1}"):
        assert value in manual


def end_without_outputs():
    sys.stdout, sys.stderr = None, SimpleNamespace(flush=Mock(side_effect=BrokenPipeError))
    end_at_once(7)


@pytest.mark.slow
def test_a_process_without_outputs_ends_at_once(tmp_path):
    ended = LoadedProcess(tmp_path / "process", end_without_outputs)
    ended.communicate()
    assert ended.returncode == 7
