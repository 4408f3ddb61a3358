"""Processes that train together: they find each other, compare settings, exchange values, and end together."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from finetune.core.options import UserError
from finetune.core.texts import join_names, shorten

# The port of the first task on each host of a Slurm step; the next task has the next port.
SLURM_PORT = 8888
ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}")
# How long to wait for every worker, in seconds.
WAIT_SECONDS = 300.0
# How often each worker checks that the others still run, between the collectives.
WATCH_SECONDS = 10.0
CONNECT_SECONDS = 5.0
# How long an ending process stays, so that the others receive its last values and find out who ended first.
LINGER_SECONDS = 2.0
# Options that may differ between hosts; the content of the paths is compared.
OWN_OPTIONS = {"train_csv", "test_csv", "validation_csv", "image_directory", "load_model_path", "save_model_path"}
OWN_OPTIONS |= {"generator_workers", "generator_queue_length", "image_cache", "image_cache_path", "gpu_percentage"}
OWN_OPTIONS |= {"verbose"}
PROJECT = Path(__file__).resolve().parents[2]
ROOT_MODULES = ("augmenter.py", "configs.py", "generator.py", "model.py")


def take_slurm_step(distribution_strategy: str = "multi_worker") -> None:
    """Sets TF_CONFIG, which TensorFlow reads, from Slurm's variables if it is not set and this is a task of a step.

    Raises:
        UserError: the variables do not name the workers.
    """
    if distribution_strategy != "multi_worker" or "TF_CONFIG" in os.environ or "SLURM_PROCID" not in os.environ:
        return
    try:
        # The GPUs stay those that Slurm gives: the resolver would number them from 0, and fails without any.
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=SLURM_PORT, gpus_per_node=2**16, gpus_per_task=1, auto_set_gpu=False
        )
        cluster = resolver.cluster_spec().as_dict()
        # Not by rank: the resolver sorts the hosts by name, and Slurm may distribute the tasks in turn.
        own = f"{os.environ['SLURMD_NODENAME']}:{SLURM_PORT + int(os.environ['SLURM_LOCALID'])}"
        task = {"type": "worker", "index": cluster["worker"].index(own)}
    except (RuntimeError, KeyError, ValueError) as error:
        reason = f"{error} is not set" if isinstance(error, KeyError) else shorten(str(error)).rstrip(".")
        raise UserError(
            f"distribution_strategy multi_worker: Slurm's variables do not name the workers: {reason}. Start train.py "
            "with srun, or set TF_CONFIG. docs/distributed.md shows how."
        ) from error
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})


def read_cluster() -> tuple[list[str], int]:
    """Returns each worker's address, host:port, the chief's first, and the index of this process, from TF_CONFIG.

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
        is_right = (
            cluster.keys() <= {"chief", "worker"}
            and len(cluster.get("chief", addresses[:1])) == 1
            and type(task["index"]) is int
            and 0 <= task["index"] < len(cluster[task["type"]])
            and len(set(addresses)) == len(addresses)
            and all(map(ADDRESS.fullmatch, addresses))
            and all(0 < int(address.rpartition(":")[2]) < 2**16 for address in addresses)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_right = False
    if not is_right:
        raise UserError(
            f"distribution_strategy multi_worker: expected TF_CONFIG to be like {expected}, with the same cluster and "
            f"another index in every process, or a Slurm step. Received: {shorten(text) if text else 'nothing'}. "
            "docs/distributed.md shows how to start."
        )
    return addresses, index


def join_team(distribution_strategy: str, options: dict[str, Any], folder: str) -> Team:
    """Returns the team of every worker in TF_CONFIG, with `multi_worker`, or of this process alone.

    All workers must have the same options, except `OWN_OPTIONS`.
    """
    if distribution_strategy != "multi_worker":
        return Team()
    return Team(*read_cluster(), select_common(options) | describe_code(), folder)


def select_common(options: dict[str, Any], state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the options, and the completed epochs of a continued run, that must be the same in all processes."""
    common = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
    return common | {"the number of epochs completed": state["epochs_completed"] if state else 0}


def describe_code() -> dict[str, str]:
    """Returns the versions of the packages and a digest of the code, which must be the same in all processes."""
    digest = hashlib.sha256()
    for path in [*(PROJECT / name for name in ROOT_MODULES), *sorted((PROJECT / "finetune").rglob("*.py"))]:
        digest.update(path.read_bytes())
    versions = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, NumPy {np.__version__}"
    return {"the packages": versions, "the code": digest.hexdigest()}


def find_obstacle(address: str) -> OSError | None:
    """Returns the reason why no connection to an address is possible; None if it is."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as peer:
            # On one machine a connection may be given the port that it calls, and reach itself.
            is_own = peer.getsockname() == peer.getpeername()
            return ConnectionRefusedError("Connection refused") if is_own else None
    except OSError as error:
        return error


def describe_failure(error: tf.errors.OpError) -> str:
    """Returns the line of a collective's error that gives the reason."""
    return shorten(str(error).rpartition("aborted by: ")[2].partition("\n")[0]).rstrip(".")


def flush_output() -> None:
    """Flushes the outputs, also if they are closed or missing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def end_at_once(status: int) -> NoReturn:
    """Ends this process before TensorFlow cleans up, which takes longer and may raise errors of its own."""
    flush_output()
    time.sleep(LINGER_SECONDS)
    # Python sets the attribute if an error has ended the script.
    os._exit(status or hasattr(sys, "last_type"))


class Team:
    """The processes that train one model together; they communicate through the collectives of TensorFlow's strategy.

    Enter it, build the strategy, then `connect`. All leave together. The end of one process ends the others: a
    collective without it raises an error, and between the collectives a thread checks that all still run.

    Args:
        addresses: host:port of each worker, the chief's first.
        index: of this process among them.
        settings: the values that must be the same in all of them, by name.
        folder: to continue from, for the error message.
    """

    def __init__(
        self, addresses: Sequence[str] = ("",), index: int = 0, settings: dict[str, Any] | None = None, folder: str = ""
    ) -> None:
        self.addresses = list(addresses)
        self.index = index
        self.settings = settings or {}
        self.folder = folder
        self._is_over = threading.Event()
        self._silence = contextlib.ExitStack()

    @property
    def is_chief(self) -> bool:
        """Whether this process writes and prints."""
        return self.index == 0

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.addresses)

    def __enter__(self) -> Team:
        if self.size == 1:
            return self
        self._meet()
        print(f"Worker {self.index} of {self.size}. The chief, {self.addresses[0]}, prints and writes.", flush=True)
        if not self.is_chief:
            nowhere = self._silence.enter_context(open(os.devnull, "w"))
            self._silence.enter_context(contextlib.redirect_stdout(nowhere))
        # Python handles no signal while it waits in a collective; training has handlers of its own.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # If a worker ends right now, this one would wait forever, in a call that blocks all threads of Python.
        faulthandler.dump_traceback_later(WAIT_SECONDS, exit=True, file=2)
        return self

    def connect(self, strategy: tf.distribute.Strategy) -> tf.distribute.Strategy:
        """Compares the settings of all workers through a strategy, and returns the strategy.

        Raises:
            UserError: in every worker: the settings or the numbers of devices differ.
        """
        if self.size == 1:
            return strategy

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)], autograph=False)
        def gather(values: tf.Tensor) -> Any:
            # It refuses bytes, and a tensor without an operation.
            return strategy.run(lambda: tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0))

        self._gather = lambda values: strategy.experimental_local_results(gather(values))[0].numpy()
        try:
            self.exchange(None)
        except tf.errors.InternalError as error:
            raise UserError(
                f"The workers cannot compute together: {describe_failure(error)}. Give every process the same "
                "TF_CONFIG except for its index, and the same number of visible GPUs."
            ) from error
        faulthandler.cancel_dump_traceback_later()
        threading.Thread(target=self._watch, daemon=True).start()
        self.check_workers_match(self.settings)
        return strategy

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        if self.size == 1:
            return
        faulthandler.cancel_dump_traceback_later()
        if error is None or isinstance(error, SystemExit):
            try:
                self.exchange(None)
            except tf.errors.OpError as failure:
                error = failure
        self._is_over.set()
        self._silence.close()
        if isinstance(error, tf.errors.OpError):
            is_loss = isinstance(error, (tf.errors.UnavailableError, tf.errors.DeadlineExceededError))
            lost = self._find_lost()
            # A killed process may still listen after its connections have broken. Survivors linger longer than this.
            end = time.monotonic() + LINGER_SECONDS / 2
            while is_loss and not lost and time.monotonic() < end:
                time.sleep(0.05)
                lost = self._find_lost()
            if lost or is_loss:
                self._end(lost, describe_failure(error))
        status = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        if error is None or isinstance(error, SystemExit):
            status = error.code if error else 0
        atexit.register(end_at_once, status)

    def check_workers_match(self, values: dict[str, Any]) -> None:
        """Compares JSON values by name over all workers.

        Raises:
            UserError: in every worker: names the worker whose value differs from the chief's.
        """
        first, *others = self.exchange(values)
        for index, other in enumerate(others, start=1):
            for name in first | other:
                if first.get(name) != other.get(name):
                    theirs, ours = (shorten(repr(worker.get(name))) for worker in (other, first))
                    raise UserError(
                        f"The workers start with different values: {name} is {theirs} for {self._name(index)} and "
                        f"{ours} for the chief. Give both the same."
                    )

    def exchange(self, value: Any) -> list[Any]:
        """Returns the JSON values of all workers in their order; all must call it equally often."""
        if self.size == 1:
            return [value]
        found = self._gather(np.frombuffer(json.dumps(value).encode() + b"\n", np.uint8).astype(np.int32))
        lines = found.astype(np.uint8).tobytes().split(b"\n")[:-1]
        # Each device contributes its process's line.
        return [json.loads(line) for line in lines[:: len(lines) // self.size]]

    def _name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"

    def _meet(self) -> None:
        """Waits until every worker listens at its address, which TensorFlow takes over.

        Raises:
            UserError: a worker does not start, or another program uses this one's port.
        """
        end = time.monotonic() + WAIT_SECONDS
        missing = [index for index in range(self.size) if index != self.index]
        with self._open_port():
            while missing := [index for index in missing if find_obstacle(self.addresses[index])]:
                if time.monotonic() > end:
                    names = join_names([self._name(index) for index in missing])
                    raise UserError(
                        f"No answer within {WAIT_SECONDS:.0f} seconds from {names}. Start train.py on every host of "
                        "TF_CONFIG, with its own index, and make its port reachable from here."
                    )
                time.sleep(0.5)

    def _open_port(self) -> socket.socket:
        port, is_dual = int(self.addresses[self.index].rpartition(":")[2]), socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        try:
            # Connections are never accepted, so the queue must hold all of them.
            return socket.create_server(("", port), family=family, backlog=self.size + 128, dualstack_ipv6=is_dual)
        except OSError as error:
            raise UserError(
                f"Port {port}, of {self._name(self.index)} in TF_CONFIG, cannot be used on this host: "
                f"{os.strerror(error.errno)}. End the program that uses it, or choose another port for all workers."
            ) from error

    def _find_lost(self) -> list[str]:
        """Returns the names of the workers that have ended: their hosts refuse the connection."""
        obstacles = {index: find_obstacle(self.addresses[index]) for index in range(self.size) if index != self.index}
        return [self._name(index) for index, found in obstacles.items() if isinstance(found, ConnectionRefusedError)]

    def _watch(self) -> None:
        """Ends this process if others have ended, also while it computes alone."""
        lost: list[str] = []
        while not self._is_over.wait(WATCH_SECONDS):
            before, lost = lost, self._find_lost()
            if before and lost and not self._is_over.is_set():
                self._end(lost)

    def _end(self, lost: list[str], reason: str = "") -> NoReturn:
        flush_output()
        name = join_names(lost) or f"a worker (TensorFlow: {reason})"
        print(
            f"\nError: {name[0].upper()}{name[1:]} has ended, was killed or is unreachable. Its last output may give "
            "the reason. Every worker stops. Start them all again: with --load_model_path "
            f"{shlex.quote(self.folder)} training continues after the last checkpoint.",
            file=sys.stderr,
        )
        end_at_once(1)
