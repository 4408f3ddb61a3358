"""Batches made by processes instead of threads, and how the processes end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import skimage.data
from PIL import Image
from small_runs import options_of, tables  # noqa: F401

from augmenter import build_augmenter
from finetune.core.options import UserError
from finetune.data.images import resize_image
from finetune.loading.batch_processes import BatchProcesses, WorkerEnded
from finetune.loading.batches import Shares
from generator import MOST_THREADS, AugmentedImageSequence

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(11):
        size = 60 + 9 * number, 120 - 5 * number
        Image.fromarray(resize_image(skimage.data.astronaut()[number:], size)).save(folder / f"{number}.jpg")
    return [str(folder / f"{number}.jpg") for number in range(11)]


def build(photos, **options) -> AugmentedImageSequence:
    facts = {"augmenter": build_augmenter(), "shuffle": True, "seed": 3, "crop_area": (0.5, 1.0)} | options
    return AugmentedImageSequence(photos, np.arange(len(photos)) % 3, (48, 40), 4, **facts)


def list_batches(sequence) -> list[tuple[np.ndarray, ...]]:
    return [tuple(part.numpy() for part in batch) for batch in sequence.to_dataset()]


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for parts, others in zip(found, expected, strict=True):
        for part, other in zip(parts, others, strict=True):
            np.testing.assert_array_equal(part, other)


def list_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_processes_make_the_batches_of_threads(photos, tmp_path):
    """In every epoch and after a resume; mixed, shared between devices, and with replaced images."""
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(Path(photos[0]).read_bytes()[:700])
    options = {"skip_bad_images": True, "mixup_alpha": 0.3, "number_of_classes": 3, "shares": Shares(3, 1, 2)}
    paths = [*photos[:5], str(bad), *photos[5:]] * 3
    threads, processes = build(paths, **options), build(paths, workers=MOST_THREADS + 1, **options)
    for epoch, first_step in ((0, 0), (1, 0), (2, 1)):
        for sequence in (threads, processes):
            sequence.epoch, sequence.first_step = epoch, first_step
        assert_same_batches(list_batches(processes), list_batches(threads))
    assert processes.bad_images == threads.bad_images
    assert threads.processes is None
    children = list_children()
    assert len(children) == MOST_THREADS + 1
    # TensorFlow would take seven times the memory.
    assert max(child.memory_info().rss for child in children) < 400 * 2**20
    processes.processes.close()
    assert not any(child.is_running() for child in children)


def test_processes_start_only_for_augmented_images(photos):
    class OfThisFunction:
        def deepcopy(self):
            return self

        def seed_(self, seed):
            pass

        def __call__(self, images):
            return images

    for options in ({"augmenter": None, "crop_area": (1, 1)}, {"augmenter": OfThisFunction()}, {"workers": 2}):
        sequence = build(photos, **{"workers": MOST_THREADS + 1} | options)
        assert len(list_batches(sequence)) == 3
        assert sequence.processes is None


def test_errors_of_a_process_are_those_of_a_thread_and_its_end_is_reported(photos, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    batches = build([*photos[:4], *[str(bad)] * 4], shuffle=False, workers=1)
    processes = BatchProcesses(batches, 1)
    assert len(processes.make("__getitem__", 0)[0]) == 4
    with pytest.raises(UserError) as of_process:
        processes.make("__getitem__", 1)
    with pytest.raises(UserError) as of_thread:
        batches[1]
    assert str(of_process.value) == str(of_thread.value)
    # A bug keeps its traceback.
    with pytest.raises(AttributeError) as bug:
        processes.make("no_such_method", 0)
    assert "_make_batches" in bug.value.__notes__[0]
    (child,) = list_children()
    child.kill()
    with pytest.raises(WorkerEnded, match="generator_workers.* signal 9"):
        processes.make("__getitem__", 0)
    processes.close()


READER = """
import sys, time
import numpy as np
sys.path.insert(0, {project!r})
from augmenter import build_augmenter
from finetune.loading.batch_processes import BatchProcesses, WorkerEnded
from finetune.loading.batches import ImageBatches
batches = ImageBatches(sys.argv[1:], np.zeros(len(sys.argv) - 1, int), (48, 40), 4, build_augmenter(), True)
processes = BatchProcesses(batches, 2)
processes.make("__getitem__", 0)
print("ready", flush=True)
{then}
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_one_that_reads(photos, tmp_path, number):
    script = tmp_path / "reader.py"
    script.write_text(READER.format(project=str(PROJECT), then="while True:\n    processes.make('__getitem__', 1)"))
    command = [sys.executable, str(script), *photos]
    reader = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert reader.stdout.readline() == "ready\n"
    children = psutil.Process(reader.pid).children()
    assert sum("spawn_main" in " ".join(child.cmdline()) for child in children) == 2
    if number == signal.SIGINT:
        # Ctrl-C in a terminal reaches all of its processes.
        os.killpg(reader.pid, number)
    else:
        reader.send_signal(number)
    assert reader.wait(60) == -number or number == signal.SIGINT
    deadline = time.monotonic() + 60
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The reader's own is the only traceback.
    assert reader.stderr.read().count("Traceback") == (number == signal.SIGINT)


@pytest.mark.slow
def test_processes_end_silently_with_their_script(photos, tmp_path):
    script = tmp_path / "reader.py"
    # The script has no guard: a process that imported it would read for ever.
    script.write_text(READER.format(project=str(PROJECT), then=""))
    done = subprocess.run([sys.executable, str(script), *photos], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


@pytest.mark.slow
def test_a_run_whose_reader_is_killed_ends_in_a_line_and_goes_on_from_its_last_epoch(tables, tmp_path):
    run = str(tmp_path / "run")
    options = options_of(tables, run, num_epochs=200, generator_workers=MOST_THREADS + 1)
    words = [word for name, value in options.items() for word in (f"--{name}", *_list_words(value))]
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "train.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "latest_model.keras").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    readers = [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    readers[0].kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    told = errors[errors.index("Error: ") :]
    assert "signal 9" in told
    assert "skip_bad_images" not in told
    assert told.splitlines()[-1].endswith(f"train.py --configs {run}/configs.json --load_model_path {run}")
    assert not any(reader.is_running() and reader.status() != psutil.STATUS_ZOMBIE for reader in readers)


def _list_words(value) -> list[str]:
    return [str(part) for part in (value if isinstance(value, list | tuple) else [value])]
