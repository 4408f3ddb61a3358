"""How many changed labels find_label_errors.py's judge finds, and what it takes for many images.

python benchmarks/label_errors.py shares SIZE FOLDER...    changes 5 % of the labels of 800 photos at random, five
                                                           times, and prints for each draw the share of the changed
                                                           ones among the first twice as many suspects, and that by a
                                                           single cross-validation's probability of the given label;
                                                           the folders hold a folder of photos a class
python benchmarks/label_errors.py memory IMAGES CHANNELS   judges made-up features of 20 classes, and prints the seconds
                                                           and the most memory that the process has had, in MiB

The features are MobileNet's; its weights are where KERAS_HOME says, or are downloaded.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
CACHE = "./data/image_cache"
PHOTOS, SHARE, DRAWS = 800, 0.05, 5
CLASSES = 20


def read_photos(folders: list[str], size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns the features of all photos, their class positions and the class names."""
    from configs import Configs
    from finetune.training.feature_store import get_features
    from generator import AugmentedImageSequence
    from model import ModelFactory

    files = sorted(str(path) for folder in folders for path in Path(folder).glob("*/*"))
    names = sorted({Path(file).parent.name for file in files})
    labels = np.array([names.index(Path(file).parent.name) for file in files], np.int32)
    configs = Configs(visual_model_name="MobileNet", image_target_size=(size, size, 3), classes=names)
    sequence = AugmentedImageSequence(files, labels, (size, size), batch_size=16, workers=2)
    features, _ = get_features(ModelFactory().get_model(configs), sequence, CACHE)
    return features, labels, names


def draw_photos(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns rows of as many photos of each class, 800 in all."""
    classes = np.unique(labels)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == one))[: PHOTOS // len(classes)] for one in classes])


def change_labels(labels: np.ndarray, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels of which some are another class, each as probable, and which these are, bool."""
    is_changed = np.zeros(len(labels), bool)
    is_changed[rng.permutation(len(labels))[: round(SHARE * len(labels))]] = True
    others = (labels + rng.integers(1, number, size=len(labels))) % number
    return np.where(is_changed, others, labels).astype(np.int32), is_changed


def measure_shares(size: int, folders: list[str]) -> None:
    """Prints the share that is found, draw by draw, and the means."""
    from finetune.studies.label_errors import answer_out_of_fold, estimate_errors, rank_suspects
    from finetune.training.probe import cross_validate

    features, truth, names = read_photos(folders, size)
    shares, bars = [], []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        rows = draw_photos(truth, rng)
        labels, is_changed = change_labels(truth[rows], len(names), rng)
        start = time.perf_counter()
        probabilities = answer_out_of_fold(features[rows], labels, False, names, seed=0)
        suspects, _, _ = rank_suspects(labels, probabilities, multi_label=False)
        estimate = estimate_errors(labels, probabilities, False, seed=0)
        seconds, changed = time.perf_counter() - start, is_changed.sum()
        shares.append(is_changed[suspects[: 2 * changed]].sum() / changed)
        once = cross_validate([features[rows]], labels, len(names), seed=0)
        alone = np.argsort(once[np.arange(len(labels)), labels], kind="stable")
        bars.append(is_changed[alone[: 2 * changed]].sum() / changed)
        print(
            f"draw {draw}: {shares[-1]:.3f} of {changed}, by one cross-validation {bars[-1]:.3f}; estimated "
            f"{estimate.number} ({estimate.low} to {estimate.high}); {len(suspects)} suspects, {seconds:.0f} s"
        )
    for name, values in (("found", shares), ("by one cross-validation", bars)):
        print(f"{name}: mean {np.mean(values):.3f}, {min(values):.3f} to {max(values):.3f}")


def measure_memory(images: int, channels: int) -> None:
    """Prints the seconds and the memory that judging takes."""
    from finetune.studies.label_errors import answer_out_of_fold, estimate_errors, find_neighbours, rank_suspects

    rng, names = np.random.default_rng(0), [str(number) for number in range(CLASSES)]
    truth = rng.integers(CLASSES, size=images).astype(np.int32)
    labels, _ = change_labels(truth, CLASSES, rng)
    features = rng.standard_normal((images, channels), np.float32)
    centres = rng.standard_normal((CLASSES, channels), np.float32) * np.float32(4 / np.sqrt(channels))
    for position in range(CLASSES):
        features[truth == position] += centres[position]
    peaks, start = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024], time.perf_counter()

    def note(what: str) -> None:
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        print(f"{what}: {time.perf_counter() - start:.0f} s, at most {peaks[-1]} MiB", flush=True)

    note("features")
    probabilities = answer_out_of_fold(features, labels, False, names, seed=0)
    note("probabilities")
    suspects, _, _ = rank_suspects(labels, probabilities, multi_label=False)
    estimate = estimate_errors(labels, probabilities, False, seed=0)
    note(f"estimate {estimate.number} ({estimate.low} to {estimate.high})")
    find_neighbours(features, suspects[:2000])
    note("neighbours")


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        measure_memory(int(sys.argv[2]), int(sys.argv[3]))
    else:
        measure_shares(int(sys.argv[2]), sys.argv[3:])
