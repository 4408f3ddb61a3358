"""Labels and probabilities drawn at random."""

import numpy as np
from scipy import special

NAMES = ["ant", "bee", "cow"]
Y_TRUE = np.array([0, 0, 1, 1, 2])
PREDICTED = np.array([0, 1, 1, 1, 0])


def one_hot(positions: np.ndarray, classes: int = 3) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[positions]


def random_multilabel(images: int = 60, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    y_true = (generator.random((images, classes)) < 0.4).astype(np.float32)
    return y_true, generator.random((images, classes)).round(1).astype(np.float32)


def random_single_label(images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(6)
    y_true, logits = generator.integers(0, classes, images), generator.normal(0, 2, (images, classes))
    logits[np.arange(images), y_true] += 2
    return y_true, special.softmax(logits, axis=1).astype(np.float32)


def share_of_ordered_pairs(truth: np.ndarray, scores: np.ndarray) -> float:
    positive, negative = scores[truth == 1][:, None], scores[truth == 0][None]
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())
