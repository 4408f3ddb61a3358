"""Trains in a process of its own, on several logical CPU devices or as one worker of several."""

import hashlib
import json
import sys
from pathlib import Path

import tensorflow as tf
from loaded_processes import LoadedProcess

import train
from configs import Configs
from finetune.core.scripts import run_script
from finetune.training import training


def run_job(runs, devices, digests_path):
    """Runs trainings one after the other, and writes the digest of the weights that each leaves in this process.

    Args:
        runs: the options of each training.
        devices: the number of logical CPUs.
        digests_path: receives the digests.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    fit, digests = training.run_phase, []

    def fit_and_digest(model, *rest):
        try:
            fit(model, *rest)
        finally:
            content = b"".join(variable.numpy().tobytes() for variable in model.weights)
            digests.append(hashlib.sha256(content).hexdigest())
            Path(digests_path).write_text(json.dumps(digests))

    training.run_phase = fit_and_digest

    def run_all(configs: Configs) -> dict:
        for options in runs:
            train.main(Configs(**options).validate())
        return {}

    sys.argv = ["train.py"]
    run_all.__module__ = "train"
    run_script(run_all)


def start(path, runs, devices=1, **environment):
    """Starts a process; its outputs and digests go to files that begin with a path."""
    return LoadedProcess(path, run_job, runs, devices, f"{path}.digests", **environment)
