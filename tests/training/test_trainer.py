"""Signals, in one process and in several, and single steps of training."""

import os
import signal

import keras
import numpy as np
import pytest
from small_recipes import flat_model, train_step

from finetune.training.trainer import Interruption

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")


def test_a_signal_of_one_process_holds_for_all_after_the_same_step():
    workers = [Interruption(is_shared=True) for _ in range(3)]

    def step():
        flags = sum(worker.get_flags() for worker in workers)
        for worker in workers:
            worker.note_flags(flags)
        return [worker.signal for worker in workers]

    assert step() == [0, 0, 0]
    workers[2]._note(signal.SIGTERM, None)
    assert [worker.signal for worker in workers] == [0, 0, 0]
    assert [worker.get_flags().tolist() for worker in workers] == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert step() == [signal.SIGTERM] * 3
    workers[1]._note(signal.SIGINT, None)
    assert step() == [signal.SIGINT] * 3


NOTED = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def heeded_hangup():
    """The tests may run under nohup, which ignores the signal."""
    if os.name != "posix":
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@posix
def test_the_first_signal_is_recorded_and_the_handlers_are_restored():
    before = [signal.getsignal(number) for number in Interruption.NUMBERS]
    for is_shared in (False, True):
        with Interruption(is_shared) as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.signal == (0 if is_shared else signal.SIGTERM)
            assert interruption.get_flags().tolist() == [0, 1, 0]
            # A second one ends the process.
            assert [signal.getsignal(number) for number in NOTED] == before[:2]
            # Service managers send it after SIGTERM.
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.get_flags().tolist() == [0, 1, 0]
    assert [signal.getsignal(number) for number in Interruption.NUMBERS] == before


@posix
def test_hangup_is_recorded_and_a_second_one_does_not_end_the_process():
    before = [signal.getsignal(number) for number in Interruption.NUMBERS]
    with Interruption() as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signal == signal.SIGHUP
            assert interruption.get_flags().tolist() == [0, 0, 1]
        assert [signal.getsignal(number) for number in NOTED] == before[:2]
    assert [signal.getsignal(number) for number in Interruption.NUMBERS] == before


@posix
def test_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signal == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def kernels(model):
    return [model.get_layer(name).kernel.numpy() for name in ("backbone", "head")]


def test_accumulated_batches_make_the_step_of_the_whole_batch():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(7, 2)), rng.normal(size=7).astype(np.float32)
    whole, parts = flat_model(keras.optimizers.SGD(0.1)), flat_model(keras.optimizers.SGD(0.1), batch_size=3)
    for model in (whole, parts):
        train_step(model, images, labels)
        assert int(model.optimizer.iterations.numpy()) == 1
    for one, other in zip(kernels(whole), kernels(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert not np.allclose(one, 1)
    assert whole.loss_sums[1] == parts.loss_sums[1] == 7
    assert whole.loss_sums[0] == pytest.approx(parts.loss_sums[0])


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_the_backbone_learns_at_a_fraction_of_the_rate(optimizer):
    whole, slow = flat_model(optimizer(0.1)), flat_model(optimizer(0.1), multiplier=0.25)
    for model in (whole, slow):
        train_step(model, [[1.0, 2.0]], [1.0])
    np.testing.assert_allclose(kernels(slow)[0] - 1, (kernels(whole)[0] - 1) / 4, rtol=1e-5)
    np.testing.assert_allclose(kernels(slow)[1], kernels(whole)[1], rtol=1e-6)
