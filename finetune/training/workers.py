"""Several processes that train together: finding each other, agreeing, exchanging, and ending together."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import re
import select
import shlex
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from finetune.core.options import UserError
from finetune.core.streams import LastingStream
from finetune.core.texts import join_names, shorten

ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}")
# How long every worker may take to come, in seconds.
WAIT_SECONDS = 300.0
PING_SECONDS = 5.0
# A worker that has said nothing for that long is lost; one that is killed is noticed at once.
LOST_AFTER_SECONDS = 60.0
LONGEST_MESSAGE = 2**26
# What may differ from host to host; what the paths lead to is compared.
OWN_OPTIONS = {"train_csv", "test_csv", "validation_csv", "image_directory", "load_model_path", "save_model_path"}
OWN_OPTIONS |= {"generator_workers", "generator_queue_length", "image_cache", "image_cache_path", "gpu_percentage"}
OWN_OPTIONS |= {"verbose"}
# In the place of what a worker says, once it has nothing left to do.
LEFT = object()


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
    return Team(*read_cluster(), select_common(options), folder)


def select_common(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that must be the same in all processes that train together."""
    return {name: value for name, value in options.items() if name not in OWN_OPTIONS}


def end_at_once(status: int) -> None:
    """Ends this process before TensorFlow closes its connections: ten seconds, and errors about the other workers."""
    # Python sets it where an error has ended the script.
    if not hasattr(sys, "last_type"):
        for stream in (sys.stdout, sys.stderr):
            # What a closed or missing stream raises would leave the end to TensorFlow.
            LastingStream(stream).flush()
        os._exit(status)


def read_message(peer: socket.socket) -> dict[str, Any]:
    """Returns the first message of whoever is connected, and nothing of what follows; an empty one where it is none."""
    try:
        message = json.loads(peer.makefile("rb", buffering=0).readline(LONGEST_MESSAGE))
    except (OSError, ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def describe_end(error: BaseException) -> tuple[int, str, str]:
    """Returns the exit status of a process that an error ends, what it prints, and the reason in a few words."""
    if isinstance(error, UserError):
        return 2, f"Error: {error}", str(error).partition("\n")[0]
    if isinstance(error, KeyboardInterrupt):
        return 130, "Interrupted.", "it was interrupted"
    return 1, "".join(traceback.format_exception(error)), f"{type(error).__name__}, as its own output tells"


class Team:
    """The processes that train one model together, and a way to talk that is not TensorFlow's.

    Each worker keeps a connection with the chief, the first of them, at the address that TensorFlow will use. Over it
    they compare what they start with, and learn within seconds that one has failed, been killed or been cut off:
    TensorFlow would wait, or end with a page of its own. All leave together.

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
        self._peers: dict[int, socket.socket] = {}
        self._received: dict[int, queue.Queue] = {}
        self._has_left: set[int] = set()
        self._is_over = False
        self._sending = threading.Lock()
        # Whoever ends this process keeps it, and all others wait for that end.
        self._ending = threading.Lock()
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
        try:
            self._meet_workers() if self.is_chief else self._meet_chief()
        except BaseException:
            for peer in self._peers.values():
                peer.close()
            raise
        for index, peer in self._peers.items():
            peer.settimeout(LOST_AFTER_SECONDS)
            self._received[index] = queue.Queue()
            threading.Thread(target=self._listen, args=(index,), daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()
        self.agree(self.settings)
        print(f"Worker {self.index} of {self.size}. The chief, {self.addresses[0]}, prints and writes.", flush=True)
        if not self.is_chief:
            nowhere = self._silence.enter_context(open(os.devnull, "w"))
            self._silence.enter_context(contextlib.redirect_stdout(nowhere))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self._silence.close()
        if self.size == 1:
            return
        if error is None or isinstance(error, SystemExit):
            self._leave()
            atexit.register(end_at_once, (error.code or 0) if error else 0)
            return
        if kind.__module__.startswith("tensorflow"):
            # Most likely another worker's end: it is told as that as soon as it is noticed.
            time.sleep(2 * PING_SECONDS)
        status, shown, reason = describe_end(error)
        with self._ending:
            # TensorFlow would wait for the other workers at this process's end.
            self._stop(shown, status, "" if self._is_over else f"{self._name(self.index)} has stopped: {reason}")

    def agree(self, values: dict[str, Any]) -> None:
        """Compares values by name, which JSON can hold, over all workers.

        Raises:
            UserError: in every worker: one has another value than the chief; names it.
        """
        first, *others = self.exchange(values)
        for index, other in enumerate(others, start=1):
            for name in first | other:
                if first.get(name) != other.get(name):
                    # All find the same: nobody has to be told.
                    self._leave()
                    theirs, ours = (shorten(repr(worker.get(name))) for worker in (other, first))
                    raise UserError(
                        f"The workers do not start with the same: {name} is {theirs} for {self._name(index)} and "
                        f"{ours} for the chief. Give both the same."
                    )

    def exchange(self, value: Any) -> list[Any]:
        """Returns the values of all workers in their order; each calls it as often as the others."""
        if self.size == 1:
            return [value]
        if not self.is_chief:
            self._tell({"value": value})
            return self._received[0].get()
        values = [json.loads(json.dumps(value)), *(self._hear(index) for index in range(1, self.size))]
        self._tell({"value": values})
        return values

    def _hear(self, index: int, has_left: bool = False) -> Any:
        """Returns what a worker says next; ends all where it has left and should not have, or the other way round."""
        value = self._received[index].get()
        if (value is LEFT) != has_left:
            self._end(
                f"{self._name(index)} has {'more' if has_left else 'nothing more'} to do, and the chief has "
                f"{'nothing' if has_left else 'something'}. Give every worker the same model to continue from.",
                2,
            )
        return value

    def _name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"

    def _meet_workers(self) -> None:
        """Waits at the chief's address until every worker has come."""
        with self._open_port() as server:
            end = time.monotonic() + WAIT_SECONDS
            while missing := [self._name(index) for index in range(1, self.size) if not self._waits(index)]:
                server.settimeout(max(end - time.monotonic(), 0.01))
                try:
                    self._welcome(server.accept()[0])
                except TimeoutError as error:
                    reason = (
                        f"{join_names(missing)} did not come to the chief at {self.addresses[0]} within "
                        f"{WAIT_SECONDS:.0f} seconds. Start train.py on every host of TF_CONFIG, with its own index."
                    )
                    self._tell({"end": reason, "status": 2})
                    raise UserError(reason) from error
        self._tell({"welcome": self.addresses})

    def _welcome(self, peer: socket.socket) -> None:
        """Takes in a worker that has come to the chief.

        Raises:
            UserError: in that worker and those before it too: its TF_CONFIG does not go with the chief's.
        """
        peer.settimeout(PING_SECONDS)
        try:
            hello = read_message(peer)["hello"]
            index, addresses = int(hello["index"]), list(hello["addresses"])
            if not 0 < index < len(addresses):
                raise ValueError(index)
        except (ValueError, KeyError, TypeError, OverflowError):
            # No worker: a port scan, or a probe of the scheduler.
            peer.close()
            return
        reason = ""
        if addresses != self.addresses:
            theirs, ours = (shorten(str(names)) for names in (addresses, self.addresses))
            reason = f"TF_CONFIG names the workers {ours} for the chief and {theirs} for worker {index}"
        elif self._waits(index):
            reason = f"TF_CONFIG: two processes say that they are {self._name(index)}"
        if reason:
            self._peers[-1] = peer
            self._tell({"end": f"{reason}. Correct TF_CONFIG.", "status": 2})
            raise UserError(f"{reason}. Correct TF_CONFIG.")
        self._peers[index] = peer

    def _waits(self, index: int) -> bool:
        """Tells whether a worker has come to the chief and is still there: it says nothing until all have come."""
        return index in self._peers and not select.select([self._peers[index]], [], [], 0)[0]

    def _meet_chief(self) -> None:
        """Connects with the chief, and waits there until every worker has come."""
        self._open_port().close()
        self._peers[0] = self._reach_chief()
        self._tell({"hello": {"index": self.index, "addresses": self.addresses}})
        # Longer than the chief waits, who then says who is missing.
        self._peers[0].settimeout(WAIT_SECONDS + 2 * PING_SECONDS)
        answer = read_message(self._peers[0])
        if "end" in answer:
            raise UserError(answer["end"])
        if "welcome" not in answer:
            raise UserError(
                f"The chief at {self.addresses[0]} has ended, or what answers there is no train.py that waits for its "
                "workers. Stop every worker, and start them all again."
            )

    def _reach_chief(self) -> socket.socket:
        """Connects with the chief as soon as that listens."""
        host, _, port = self.addresses[0].rpartition(":")
        end = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                peer = socket.create_connection((host.strip("[]"), int(port)), timeout=PING_SECONDS)
                # On one machine a connection may be given the very port that it calls, and reach itself.
                if peer.getsockname() != peer.getpeername():
                    return peer
                peer.close()
            except OSError as error:
                if time.monotonic() > end:
                    raise UserError(
                        f"The chief, {self._name(0)}, did not answer within {WAIT_SECONDS:.0f} seconds: "
                        f"{error.strerror or error}. Start train.py there too, and let its port be reached from here."
                    ) from error
            time.sleep(0.2)

    def _open_port(self) -> socket.socket:
        """Takes the port of this process's own address; the caller closes it before TensorFlow needs it."""
        port = int(self.addresses[self.index].rpartition(":")[2])
        server = socket.socket()
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            # Room for strangers too: whoever finds none tries again only after a second.
            server.listen(self.size + 128)
        except OSError as error:
            server.close()
            raise UserError(
                f"Port {port}, of {self._name(self.index)} in TF_CONFIG, cannot be used on this host: "
                f"{error.strerror}. End the program that has it, or choose another port for all workers."
            ) from error
        return server

    def _listen(self, index: int) -> None:
        """Takes what a peer sends, until it leaves; ends this process where the peer ends otherwise."""
        try:
            with self._peers[index].makefile("rb") as lines:
                while line := lines.readline(LONGEST_MESSAGE):
                    message = json.loads(line)
                    if "end" in message:
                        self._end(message["end"], message["status"])
                    elif "left" in message:
                        self._has_left.add(index)
                        self._received[index].put(LEFT)
                    elif "value" in message:
                        self._received[index].put(message["value"])
        except (OSError, ValueError):
            pass
        if index not in self._has_left:
            self._end(
                f"{self._name(index)} was killed or cannot be reached any more. Every worker stops. Start them all "
                f"again with --load_model_path {shlex.quote(self.folder)}: training goes on after the last checkpoint.",
                1,
            )

    def _end(self, text: str, status: int) -> None:
        """Ends this process for what has happened to another, unless all have left."""
        with self._ending:
            if not self._is_over:
                self._stop(f"\nError: {text[0].upper()}{text[1:]}", status, text if self.is_chief else "")

    def _stop(self, shown: str, status: int, told: str) -> NoReturn:
        """Ends this process with a message: its main thread may wait in a collective operation for ever."""
        try:
            if told:
                self._tell({"end": told, "status": status})
            self._silence.close()
            print(shown, file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:
            os._exit(status)

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for peer in self._peers.values():
                # Whoever listens to that peer notices that it is gone.
                with contextlib.suppress(OSError):
                    peer.sendall(line)

    def _ping(self) -> None:
        while not self._is_over:
            self._tell({})
            time.sleep(PING_SECONDS)

    def _leave(self) -> None:
        """Waits until all are done: the end of one would end the others."""
        if not self.is_chief:
            self._tell({"left": True})
        for index in self._received:
            self._hear(index, has_left=True)
        with self._ending:
            self._is_over = True
        if self.is_chief:
            self._tell({"left": True})
