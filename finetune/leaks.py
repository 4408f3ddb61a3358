"""Test images that have a near copy in the training set, and the results without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from configs import Configs
from finetune.data_check import Reading, look_for_copies
from finetune.decision import Decision
from finetune.evaluation import evaluate_set
from finetune.photo_groups import pick_groups
from finetune.tables import ImageTable
from generator import AugmentedImageSequence


def evaluate_leak(
    sequences: dict[str, AugmentedImageSequence],
    predictions: dict[str, np.ndarray],
    decision: Decision,
    configs: Configs,
) -> dict[str, Any]:
    """Evaluates the test set without the images that have a near copy in the training set.

    Args:
        sequences: by set, their images read; there may be no training set.
        predictions: the model's raw probabilities by set, `(images, classes)`.
        decision: as fitted.
        configs: `verify_data` says how thoroughly to look; the seed of the bootstrap.

    Returns:
        `near_copies_in_training`: of it `images` is how many test images have a near copy, `without` the metrics of the
        others with `intervals`, None if there are no others. Empty if near copies are not looked for.
    """
    test = sequences["test"]
    leaked = (
        find_leaked(sequences["training"].paths, test.get_read_paths(), configs) if "training" in sequences else None
    )
    if leaked is None:
        return {}
    found: dict[str, Any] = {"images": int(leaked.sum()), "without": None}
    if leaked.any() and not leaked.all():
        rest, seed = ~leaked, configs.random_seed or 0
        groups = pick_groups(test.get_read_groups(), rest)
        metrics = evaluate_set(test.get_y_true()[rest], predictions["test"][rest], decision, seed=seed, groups=groups)
        scalars = {name: value for name, value in metrics.items() if isinstance(value, float | int)}
        intervals = {name: value for name, value in metrics["intervals"].items() if name in scalars}
        found["without"] = scalars | {"intervals": intervals}
    return {"near_copies_in_training": found}


def find_leaked(training: Sequence[str], tested: Sequence[str], configs: Configs) -> np.ndarray | None:
    """Returns which test images have an exact or near copy among the training images.

    Args:
        training: image files.
        tested: image files.
        configs: `verify_data` says how thoroughly to look.

    Returns:
        bool `(tested,)`; None if `verify_data` leaves near copies out or the search would take too long, which is
        printed.
    """
    if configs.verify_data not in ("quick", "full"):
        return None
    tables = [
        ImageTable(name, name, [*files], [*files], [""] * len(files))
        for name, files in (("training", training), ("test", tested))
    ]
    known, copies = look_for_copies(tables, configs.verify_data, Reading.of(configs))
    if all(one.thumbnail is None for one in known.values()):
        return None
    return copies.find_shared(tables[1], tables[0])
