"""Trains in a process of its own, on several logical CPU devices or as one worker of several: see `main`."""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def main(path: str) -> None:
    """Runs the trainings that a JSON file describes, one after the other.

    The file holds `devices`, how many logical CPUs there are; `runs`, the options of each; and `digests`, a file that
    receives the digest of the weights that each run leaves in this process.
    """
    job = json.loads(Path(path).read_text())
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * job["devices"])
    import train
    from configs import Configs
    from finetune.training import training

    fit, digests = training.run_phase, []

    def fit_and_note(model, *rest):
        try:
            fit(model, *rest)
        finally:
            digest = hashlib.sha256()
            for variable in model.weights:
                digest.update(variable.numpy().tobytes())
            digests.append(digest.hexdigest())
            Path(job["digests"]).write_text(json.dumps(digests))

    training.run_phase = fit_and_note

    def run_all(configs: Configs) -> dict:
        for options in job["runs"]:
            train.main(Configs(**options).validate())
        return {}

    sys.argv = sys.argv[:1]
    run_all.__module__ = "train"
    from finetune.core.scripts import run_script

    run_script(run_all)


if __name__ == "__main__":
    main(sys.argv[1])
