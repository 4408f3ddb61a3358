"""Several processes that train together: finding each other, agreeing, exchanging values, and ending together."""

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

# The port of the first task on each host of a Slurm step; the others have those after it.
SLURM_PORT = 8888
ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}")
# How long every worker may take to come, in seconds.
WAIT_SECONDS = 300.0
# How often each worker checks that the others are still there, between the collectives.
WATCH_SECONDS = 10.0
CONNECT_SECONDS = 5.0
# How long a process stays after its end, for the others to receive its last values, and to find who ended first.
LINGER_SECONDS = 2.0
# What may differ from host to host; what the paths lead to is compared.
OWN_OPTIONS = {"train_csv", "test_csv", "validation_csv", "image_directory", "load_model_path", "save_model_path"}
OWN_OPTIONS |= {"generator_workers", "generator_queue_length", "image_cache", "image_cache_path", "gpu_percentage"}
OWN_OPTIONS |= {"verbose"}
PROJECT = Path(__file__).resolve().parents[2]
ROOT_MODULES = ("augmenter.py", "configs.py", "generator.py", "model.py")


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


def join_team(distribution_strategy: str, options: dict[str, Any], folder: str) -> Team:
    """Builds the team that an option wants: of every worker in TF_CONFIG, or of this process alone.

    Args:
        distribution_strategy: `multi_worker` has several.
        options: of the run; but for those of each host, they must be the same in all processes.
        folder: named as the place to continue from.
    """
    if distribution_strategy != "multi_worker":
        return Team()
    return Team(*read_cluster(), select_common(options) | describe_code(), folder)


def select_common(options: dict[str, Any], state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the options, and of a run that goes on the epochs behind it, that must be the same in all processes."""
    common = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
    return common | {"the number of epochs completed": state["epochs_completed"] if state else 0}


def describe_code() -> dict[str, str]:
    """Returns the versions of the packages and a digest of the code, which must be the same in all processes too."""
    digest = hashlib.sha256()
    for path in [*(PROJECT / name for name in ROOT_MODULES), *sorted((PROJECT / "finetune").rglob("*.py"))]:
        digest.update(path.read_bytes())
    versions = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, NumPy {np.__version__}"
    return {"the packages": versions, "the code": digest.hexdigest()}


def find_obstacle(address: str) -> OSError | None:
    """Returns why no connection with an address is possible; None if one is."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as peer:
            # On one machine a connection may be given the very port that it calls, and reach itself.
            is_own = peer.getsockname() == peer.getpeername()
            return ConnectionRefusedError("Connection refused") if is_own else None
    except OSError as error:
        return error


def describe_failure(error: tf.errors.OpError) -> str:
    """Returns the line of a collective's error that says why."""
    return shorten(str(error).rpartition("aborted by: ")[2].partition("\n")[0]).rstrip(".")


def flush_output() -> None:
    """Writes out what was printed; an output that is closed or missing keeps nothing from ending."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def end_at_once(status: int) -> NoReturn:
    """Ends this process before TensorFlow tidies up, which takes longer and may end in errors of its own."""
    flush_output()
    time.sleep(LINGER_SECONDS)
    # Python sets the attribute where an error has ended the script.
    os._exit(status or hasattr(sys, "last_type"))


class Team:
    """The processes that train one model together; they talk through the collectives of TensorFlow's strategy.

    Enter it, build the strategy, then `connect`. All leave together. The end of one ends the others: a collective in
    which it is missing raises an error, and between the collectives a thread checks that all are there.

    Args:
        addresses: host:port of each worker, the chief's first.
        index: the position of this process among them.
        settings: what must be the same in all of them, by name.
        folder: named as the place to continue from.
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
        """How many processes there are."""
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
        # A worker that ends right now would be waited for without an end, and no thread of Python's could run.
        faulthandler.dump_traceback_later(WAIT_SECONDS, exit=True, file=2)
        return self

    def connect(self, strategy: tf.distribute.Strategy) -> tf.distribute.Strategy:
        """Compares the settings of all workers through a strategy, and returns that.

        Raises:
            UserError: in every worker: they differ, or the workers have different numbers of devices.
        """
        if self.size == 1:
            return strategy

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)], autograph=False)
        def gather(values: tf.Tensor) -> Any:
            # Refused without the operation, and for bytes.
            return strategy.run(lambda: tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0))

        self._gather = lambda values: strategy.experimental_local_results(gather(values))[0].numpy()
        try:
            self.exchange(None)
        except tf.errors.InternalError as error:
            raise UserError(
                f"The workers cannot compute together: {describe_failure(error)}. Give every process the same "
                "TF_CONFIG but for its index, and the same number of visible GPUs."
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
            # A killed process may still listen after its connections have broken. The survivors linger for longer.
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
        """Compares values by name, which JSON can hold, over all workers.

        Raises:
            UserError: in every worker: one has another value than the chief; names it.
        """
        first, *others = self.exchange(values)
        for index, other in enumerate(others, start=1):
            for name in first | other:
                if first.get(name) != other.get(name):
                    theirs, ours = (shorten(repr(worker.get(name))) for worker in (other, first))
                    raise UserError(
                        f"The workers do not start with the same: {name} is {theirs} for {self._name(index)} and "
                        f"{ours} for the chief. Give both the same."
                    )

    def exchange(self, value: Any) -> list[Any]:
        """Returns the JSON values of all workers in their order; each calls it as often as the others."""
        if self.size == 1:
            return [value]
        found = self._gather(np.frombuffer(json.dumps(value).encode() + b"\n", np.uint8).astype(np.int32))
        lines = found.astype(np.uint8).tobytes().split(b"\n")[:-1]
        # Each device has brought its process's.
        return [json.loads(line) for line in lines[:: len(lines) // self.size]]

    def _name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"

    def _meet(self) -> None:
        """Waits until every worker listens at its address, where TensorFlow will then.

        Raises:
            UserError: a worker does not come, or another program has this one's port.
        """
        end = time.monotonic() + WAIT_SECONDS
        missing = [index for index in range(self.size) if index != self.index]
        with self._open_port():
            while missing := [index for index in missing if find_obstacle(self.addresses[index])]:
                if time.monotonic() > end:
                    names = join_names([self._name(index) for index in missing])
                    raise UserError(
                        f"No answer came within {WAIT_SECONDS:.0f} seconds from {names}. Start train.py on every host "
                        "of TF_CONFIG, with its own index, and let its port be reached from here."
                    )
                time.sleep(0.5)

    def _open_port(self) -> socket.socket:
        port, is_dual = int(self.addresses[self.index].rpartition(":")[2]), socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        try:
            # Nobody is let in, so there must be room for all.
            return socket.create_server(("", port), family=family, backlog=self.size + 128, dualstack_ipv6=is_dual)
        except OSError as error:
            raise UserError(
                f"Port {port}, of {self._name(self.index)} in TF_CONFIG, cannot be used on this host: "
                f"{os.strerror(error.errno)}. End the program that has it, or choose another port for all workers."
            ) from error

    def _find_lost(self) -> list[str]:
        """Returns the names of the workers that have ended: their hosts answer, and nobody listens there."""
        obstacles = {index: find_obstacle(self.addresses[index]) for index in range(self.size) if index != self.index}
        return [self._name(index) for index, found in obstacles.items() if isinstance(found, ConnectionRefusedError)]

    def _watch(self) -> None:
        """Ends this process if others have ended, however long this one computes alone."""
        lost: list[str] = []
        while not self._is_over.wait(WATCH_SECONDS):
            before, lost = lost, self._find_lost()
            if before and lost and not self._is_over.is_set():
                self._end(lost)

    def _end(self, lost: list[str], reason: str = "") -> NoReturn:
        """Ends this process because others have ended."""
        flush_output()
        name = join_names(lost) or f"a worker (TensorFlow: {reason})"
        print(
            f"\nError: {name[0].upper()}{name[1:]} has ended, was killed or cannot be reached any more. What it has "
            "written last may tell why. Every worker stops. Start them all again: with --load_model_path "
            f"{shlex.quote(self.folder)} training goes on after the last checkpoint.",
            file=sys.stderr,
        )
        end_at_once(1)
