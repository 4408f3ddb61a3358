"""Processes that make batches when threads would wait for each other: each process has its own interpreter lock.

They are spawned, because TensorFlow's threads rule out a fork, and don't import TensorFlow. Pixels return in anonymous
shared memory, which is freed with its last user. Requests and the rest of a batch go through a pipe. A process ends
when its pipe breaks, so it never outlives its reader.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.util
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

import numpy as np

from finetune.core.options import UserError
from finetune.loading.batches import ImageBatches

# Seconds for a process to end by itself.
PATIENCE = 5.0
# Signals to the whole group of processes are handled by the training process; the others end with it.
LEFT_TO_THE_PARENT = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


class WorkerEnded(UserError):
    """A process that makes batches has ended too early."""


class Worker(NamedTuple):
    """A process that makes batches, its pipe, and its memory for the pixels of a batch."""

    process: SpawnProcess
    connection: Connection
    pixels: np.ndarray


class BatchProcesses:
    """Makes batches in processes, exactly as calls in this process would.

    Args:
        batches: copied to each process; `epoch` and `first_step` are read at each call. They must have no cache.
        number: of processes.

    Raises:
        Exception: the augmenter cannot be pickled.
    """

    def __init__(self, batches: ImageBatches, number: int) -> None:
        self._batches = batches
        self._size = batches.largest_share * math.prod(batches.image_size) * 3
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        workers: list[Worker] = []
        # At its end, Python waits for its processes; their pipes have to break before that.
        self.close = multiprocessing.util.Finalize(self, _end, (workers,), exitpriority=10)
        try:
            with _without_main_module(), _blocking_signals():
                for _ in range(number):
                    workers.append(self._start())
                    self._free.put(workers[-1])
        except BaseException:
            self.close()
            raise

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        memory = context.RawArray("B", self._size)
        ours, theirs = context.Pipe()
        process = context.Process(target=_make_batches, args=(self._batches.copy_facts(), theirs, memory))
        process.start()
        # Otherwise the pipe would not break when the process ends.
        theirs.close()
        return Worker(process, ours, np.frombuffer(memory, np.uint8))

    def make(self, name: str, index: int) -> tuple[np.ndarray, ...]:
        """Returns what the method `name` of the batches returns for `index`; waits for a free process.

        Raises:
            UserError: raised by the method.
            WorkerEnded: the process has ended.
        """
        worker = self._free.get()
        try:
            worker.connection.send((name, int(index), self._batches.epoch, self._batches.first_step))
            shape, rest, bad_images, error = worker.connection.recv()
            if error is None:
                images = worker.pixels[: math.prod(shape)].reshape(shape).copy()
        except (EOFError, OSError) as ended:
            raise WorkerEnded(_describe_end(worker.process)) from ended
        finally:
            self._free.put(worker)
        self._batches.bad_images.update(bad_images)
        if error is not None:
            raise error
        return images, *rest


def _describe_end(process: SpawnProcess) -> str:
    process.join(PATIENCE)
    code = process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
    memory = ": if it ran out of memory, lower generator_workers" if code == -9 else ""
    return f"A process that reads images (one of generator_workers) {how}{memory}."


def _make_batches(batches: ImageBatches, connection: Connection, memory: Any) -> None:
    """Makes the requested batches until the pipe breaks: the main function of each process."""
    pixels = np.frombuffer(memory, np.uint8)
    with contextlib.suppress(EOFError, OSError):
        while True:
            name, index, batches.epoch, batches.first_step = connection.recv()
            batches.bad_images = {}
            try:
                images, *rest = getattr(batches, name)(index)
            except Exception as error:
                if not isinstance(error, UserError):
                    error.add_note(f"In a process that reads images: {traceback.format_exc()}")
                connection.send(((), [], batches.bad_images, error))
                continue
            pixels[: images.size] = images.ravel()
            connection.send((images.shape, rest, batches.bad_images, None))


def _end(workers: list[Worker]) -> None:
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.process.join(PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
    workers.clear()


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Hides the running script: each spawned process would import it and TensorFlow, which costs 0.7 GB and 5 s."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    for name in kept:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


@contextlib.contextmanager
def _blocking_signals() -> Iterator[None]:
    """Blocks the signals of `LEFT_TO_THE_PARENT`; processes that are started here inherit that."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    # multiprocessing's helper process would unblock them when it starts.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
