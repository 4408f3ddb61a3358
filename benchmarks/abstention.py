"""Measures promised errors, unknown photos and shifted batches, with a linear probe or a trained model.

python benchmarks/abstention.py --data flowers=FOLDER --data signs=FOLDER --data voc=CSV:FOLDER --data tiles=FOLDER \
    --together tiles
python benchmarks/abstention.py ... --model flowers=RUN/best_model.keras --trained flowers=RUN/trained_images.csv

Each data set is divided once: --train_per_class photos of each class train (of a data set with several labels, three
fifths of its photos), the others validate and test. --together keeps near copies in one part, and counts them as one
group. Features are computed once and kept in --cache.

promises  100 times, the other photos are divided into --validation photos and test photos. Printed: the mean share
          answered, and how often more than the promised share of the answers is wrong, with its exact 95 % interval
unknown   AUROC of the familiarity of test photos against photos of each other data set, and the share of those that is
          accepted where 95 % of the test photos are; the same for each class, left out of training
shifts    share of batches of 30, 100 and 300 test photos that find_excess warns of: as they are, altered, and with
          photos of another data set among them
seconds   that comparing with the reference adds to a prediction

--model measures a trained model instead of the probe, on photos that its run was not trained on; a class is then not
left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import keras
import numpy as np
import pandas as pd
from scipy.stats import binomtest, rankdata

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.near_copies import compress, scale_values
from benchmarks.recipe_photos import Photos, keep_near_copies_together, read_photos
from configs import Configs
from finetune.data.groups import deal_groups, pick_groups
from finetune.data.images import fit_image, read_image
from finetune.evaluation.abstention import (
    Abstention,
    Evidence,
    Wishes,
    answer_evidence,
    fit_abstention,
    measure_answers,
)
from finetune.evaluation.calibration import fit_temperature
from finetune.evaluation.decision import Decision
from finetune.evaluation.novelty import Reference, to_unit_length
from finetune.evaluation.shift import find_excess
from finetune.models.model_files import load_model
from finetune.predicting.predicting import compile_with_features
from finetune.training.probe import initialize_head, split_head
from model import ModelFactory

SPLITS, PROMISES, BATCHES, DRAWS, SHIFTED = 100, (0.02, 0.05), (30, 100, 300), 200, 300
BATCH = 32
ALTERATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "blurred": lambda image: cv2.GaussianBlur(image, (0, 0), 3),
    "JPEG quality 10": lambda image: compress(image, 10),
    "darker by 60": lambda image: scale_values(image, 1, -60),
    "lighter by 60": lambda image: scale_values(image, 1, 60),
}


class Known(NamedTuple):
    """A model on the photos of its data set that it was not trained on.

    Attributes:
        answer: from features to raw probabilities; of a trained model, of the features of its own backbone.
        reference: of the training photos.
        y_true: of the other photos.
        raw: probabilities of the other photos.
        similarities: of the other photos.
        groups: of the other photos, or None.
    """

    answer: Callable[[np.ndarray], np.ndarray]
    reference: Reference
    y_true: np.ndarray
    raw: np.ndarray
    similarities: np.ndarray
    groups: np.ndarray | None

    @property
    def multi_label(self) -> bool:
        return self.y_true.ndim == 2

    def select(self, rows: np.ndarray, decision: Decision) -> Evidence:
        """Returns some of the photos as evidence."""
        calibrated = decision.calibrate(self.raw[rows])
        facts = self.y_true[rows], calibrated, decision.choose(calibrated), self.similarities[rows]
        return Evidence(*facts, pick_groups(self.groups, rows))

    def calibrate(self, rows: np.ndarray) -> Decision:
        """Returns a decision with the temperature of some photos."""
        names = [str(position) for position in range(self.raw.shape[1])]
        temperature = fit_temperature(self.y_true[rows], self.raw[rows], self.multi_label)
        return Decision(names, self.multi_label, temperature)


def main() -> None:
    """Computes the features and prints the tables."""
    arguments = parse_arguments()
    data = {photos.name: photos for photos in map(read_data, arguments.data)}
    data |= {name: keep_near_copies_together(data[name]) for name in arguments.together}
    models = dict(text.split("=", 1) for text in arguments.model)
    known, features = {}, {}
    for name, photos in data.items():
        network = build_network(photos, models.get(name), arguments)
        own = describe(network, photos.paths, f"{arguments.cache}/{name}_{name}.npz")
        is_trained = find_trained(photos, dict(text.split("=", 1) for text in arguments.trained).get(name), arguments)
        known[name] = fit(network, photos, own, is_trained, fits_head=name not in models)
        features[name] = {name: own}
        for other in data if name in models else ():
            features[name][other] = describe(network, data[other].paths, f"{arguments.cache}/{name}_{other}.npz")
    for name in data:
        features[name] |= {other: features[other][other] for other in data if other not in features[name]}
    print_promises(known, arguments.validation)
    print_unknown(known, features)
    print_left_out({name: photos for name, photos in data.items() if name not in models}, features, arguments)
    print_shifts(known, data, features, models, arguments)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, action="append", metavar="NAME=PLACE", help="as for recipes.py")
    parser.add_argument("--together", nargs="+", default=[], metavar="NAME", help="data sets with near copies")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help="instead of the probe")
    parser.add_argument("--trained", action="append", default=[], metavar="NAME=CSV", help="photos it was trained on")
    parser.add_argument("--train_per_class", type=int, default=60)
    parser.add_argument("--validation", type=int, nargs="+", default=[300], help="numbers of validation photos")
    parser.add_argument("--backbone", default="MobileNet")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--cache", default="abstention_features", metavar="FOLDER")
    return parser.parse_args()


def read_data(text: str) -> Photos:
    """Reads a data set from NAME=PLACE."""
    return read_photos(*text.split("=", 1))


def build_network(photos: Photos, path: str | None, arguments: argparse.Namespace) -> keras.Model:
    """Returns a trained model, or a backbone with its ImageNet weights and a new head for the data set's classes."""
    if path:
        return load_model(path)
    size = (arguments.image_size, arguments.image_size, 3)
    return ModelFactory().get_model(
        Configs(
            visual_model_name=arguments.backbone,
            image_target_size=size,
            classes=photos.class_names,
            multi_label_classification=photos.multi_label,
        )
    )


class Described(NamedTuple):
    """What a network gives for photos: probabilities, and features before and after scaling to length 1."""

    raw: np.ndarray
    features: np.ndarray

    @property
    def units(self) -> np.ndarray:
        return to_unit_length(self.features)


def describe(
    network: keras.Model, paths: Sequence[str], file: str, alter: Callable[[np.ndarray], np.ndarray] | None = None
) -> Described:
    """Returns what a network gives for photos, from a file if it is there."""
    if Path(file).is_file():
        with np.load(file) as stored:
            return Described(stored["raw"], stored["features"])
    run, size, found = compile_with_features(network), network.input_shape[1:3], []
    for start in range(0, len(paths), BATCH):
        images = [read_image(path, size) for path in paths[start : start + BATCH]]
        images = [fit_image(alter(image) if alter else image, size, "stretch") for image in images]
        found.append([np.asarray(part, np.float32) for part in run(np.stack(images))])
    described = Described(*(np.concatenate(part) for part in zip(*found, strict=True)))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **described._asdict())
    return described


def find_trained(photos: Photos, table: str | None, arguments: argparse.Namespace) -> np.ndarray:
    """Returns which photos train, bool `(photos,)`: those of a run's table, or a random part."""
    if table:
        names = {Path(path).name for path in pd.read_csv(table)["path"]}
        return np.array([Path(path).name in names for path in photos.paths])
    rng, is_trained = np.random.default_rng(5), np.zeros(len(photos.paths), bool)
    if photos.groups is not None:
        folds = deal_groups(photos.truth.argmax(axis=1), photos.groups, len(photos.class_names), 5, 5)
        is_trained[np.concatenate(folds[:2])] = True
    elif photos.multi_label:
        is_trained[rng.permutation(len(is_trained))[: len(is_trained) * 3 // 5]] = True
    else:
        for column in photos.truth.T:
            is_trained[rng.permutation(np.flatnonzero(column))[: arguments.train_per_class]] = True
    return is_trained


def fit(network: keras.Model, photos: Photos, own: Described, is_trained: np.ndarray, fits_head: bool) -> Known:
    """Fits the head to the training photos, unless the network is trained, and answers the others."""
    y_true = photos.truth.astype(int) if photos.multi_label else photos.truth.argmax(axis=1)
    groups = pick_groups(photos.groups, is_trained)
    answer = None
    if fits_head:
        initialize_head(network, [own.features[is_trained]], y_true[is_trained], 0, None, groups)
        head = split_head(network)
        answer = lambda features: head.predict(features, verbose=0, batch_size=1024)  # noqa: E731
    names = [str(path) for path in photos.paths[is_trained]]
    reference = Reference.choose(own.units[is_trained], names, names, "", 0)
    similarities = reference.find_neighbours(own.units[~is_trained]).similarities.mean(axis=1)
    raw = answer(own.features[~is_trained]) if fits_head else own.raw[~is_trained]
    return Known(answer, reference, y_true[~is_trained], raw, similarities, pick_groups(photos.groups, ~is_trained))


def divide(known: Known, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of about `number` validation photos and of the test photos; groups stay whole."""
    rng, photos = np.random.default_rng(seed), len(known.y_true)
    if known.groups is None:
        order = rng.permutation(photos)
    else:
        order = np.argsort(rng.permutation(known.groups.max() + 1)[known.groups], kind="stable")
        number += int(np.argmax(np.append(known.groups[order][number:] != known.groups[order][number - 1], True)))
    return order[:number], order[number:]


def print_promises(known: dict[str, Known], numbers: Sequence[int]) -> None:
    """Prints coverage and broken promises over re-splits of validation and test photos."""
    print("\n| data | validation photos | error of all | promised | answered | broken |\n|---|---|---|---|---|---|")
    for name, one in known.items():
        for number in numbers:
            if number > 0.8 * len(one.y_true):
                continue
            for promised in PROMISES:
                found = [measure_split(one, number, promised, seed) for seed in range(SPLITS)]
                answered, given, wrong, total = (np.array(part) for part in zip(*found, strict=True))
                broken = int((wrong > promised * given).sum())
                low, high = binomtest(broken, SPLITS).proportion_ci(method="exact")
                shown = f"{broken} of {SPLITS} ({low:.0%} to {high:.0%})"
                print(f"| {name} | {number} | {total.mean():.3f} | {promised:.0%} | {answered.mean():.3f} | {shown} |")


def measure_split(known: Known, number: int, promised: float, seed: int) -> tuple[float, int, int, float]:
    """Returns the share answered in a test set, the number of answers, of wrong ones, and the error without a rule."""
    validation, test = divide(known, number, seed)
    decision = known.calibrate(validation)
    rule = fit_abstention(known.select(validation, decision), Wishes(promised, 0.01))
    evidence = known.select(test, decision)
    found = measure_answers(answer_evidence(rule, evidence), evidence.y_true)
    whole = measure_answers(answer_evidence(None, evidence), evidence.y_true)
    return found["coverage"], found["answered"], found["wrong"], whole["error"]


def fit_familiarity(known: Known, number: int) -> tuple[Abstention, Decision, np.ndarray]:
    """Returns a rule without a promise, its decision and the rows of the test photos."""
    validation, test = divide(known, number, 0)
    decision = known.calibrate(validation)
    return fit_abstention(known.select(validation, decision), Wishes(0, 0.01)), decision, test


def compare(rule: Abstention, decision: Decision, test: Evidence, others: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """Returns AUROC and the accepted share of unknown photos by familiarity, and AUROC by each of its two parts.

    Args:
        rule: with the scales.
        decision: for the temperature.
        test: photos of the known classes.
        others: raw probabilities and similarities of the unknown photos.
    """
    calibrated, similarities = decision.calibrate(others[0]), others[1]
    familiar, unfamiliar = (
        rule.measure_familiarity(*facts, test.multi_label)
        for facts in ((test.calibrated, test.similarities), (calibrated, similarities))
    )
    accepted = float((unfamiliar >= np.quantile(familiar, 0.05)).mean())
    by_probability = get_auroc(test.calibrated.max(axis=1), calibrated.max(axis=1))
    return [get_auroc(familiar, unfamiliar), accepted, by_probability, get_auroc(test.similarities, similarities)]


def get_auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Returns the chance that a known photo has a higher score than an unknown one; equal scores count half."""
    ranks = rankdata(np.concatenate([known, unknown]))[: len(known)]
    return float((ranks.sum() - len(known) * (len(known) + 1) / 2) / (len(known) * len(unknown)))


def answer_others(known: Known, others: Described) -> tuple[np.ndarray, np.ndarray]:
    """Returns raw probabilities and similarities of photos of another data set."""
    raw = others.raw if known.answer is None else known.answer(others.features)
    return raw, known.reference.find_neighbours(others.units).similarities.mean(axis=1)


def print_unknown(known: dict[str, Known], features: dict[str, dict[str, Described]]) -> None:
    """Prints how well photos of other data sets are told from known ones."""
    print("\n| known | unknown | AUROC | accepted | by probability | by similarity |\n|---|---|---|---|---|---|")
    rows = []
    for name, one in known.items():
        rule, decision, test = fit_familiarity(one, len(one.y_true) // 2)
        for other in known:
            if other != name:
                found = compare(rule, decision, one.select(test, decision), answer_others(one, features[name][other]))
                rows.append(found)
                print(f"| {name} | {other} | {' | '.join(f'{value:.3f}' for value in found)} |")
    print(f"| mean | | {' | '.join(f'{value:.3f}' for value in np.mean(rows, axis=0))} |")


def print_left_out(
    data: dict[str, Photos], features: dict[str, dict[str, Described]], arguments: argparse.Namespace
) -> None:
    """Prints how well the photos of a class that was left out of training are told from known ones."""
    print("\n| data | class left out | AUROC | accepted | by probability | by similarity |\n|---|---|---|---|---|---|")
    rows = []
    for name, photos in data.items():
        for position, class_name in enumerate([] if photos.multi_label else photos.class_names):
            is_out, own = photos.truth[:, position] > 0, features[name][name]
            rest = photos._replace(
                paths=photos.paths[~is_out],
                truth=np.delete(photos.truth, position, axis=1)[~is_out],
                class_names=[one for one in photos.class_names if one != class_name],
                groups=pick_groups(photos.groups, ~is_out),
            )
            network = build_network(rest, None, arguments)
            inside = Described(own.raw[~is_out], own.features[~is_out])
            one = fit(network, rest, inside, find_trained(rest, None, arguments), fits_head=True)
            rule, decision, test = fit_familiarity(one, len(one.y_true) // 2)
            others = answer_others(one, Described(own.raw[is_out], own.features[is_out]))
            rows.append(compare(rule, decision, one.select(test, decision), others))
            print(f"| {name} | {class_name} | {' | '.join(f'{value:.3f}' for value in rows[-1])} |")
    if rows:
        print(f"| mean | | {' | '.join(f'{value:.3f}' for value in np.mean(rows, axis=0))} |")


def print_shifts(
    known: dict[str, Known],
    data: dict[str, Photos],
    features: dict[str, dict[str, Described]],
    models: dict[str, str],
    arguments: argparse.Namespace,
) -> None:
    """Prints the share of batches that are warned of, and the seconds that the comparison adds."""
    print(f"\n| data | batch | {' | '.join(f'{size} photos' for size in BATCHES)} |\n|---|---|{'---|' * len(BATCHES)}")
    for name, one in known.items():
        rule, decision, test = fit_familiarity(one, len(one.y_true) // 2)
        validation = np.setdiff1d(np.arange(len(one.y_true)), test)
        rule = fit_abstention(one.select(validation, decision), Wishes(0.05, 0.01))
        plain = one.raw[test], one.similarities[test]
        rng, paths = np.random.default_rng(3), list_tested(one, data[name], test)
        chosen = rng.permutation(len(paths))[:SHIFTED]
        network = build_network(data[name], models.get(name), arguments)
        kinds = {"as they are": [(plain, 1.0)]}
        for kind, alter in ALTERATIONS.items():
            file = f"{arguments.cache}/{name}_{kind.replace(' ', '_')}.npz"
            kinds[kind] = [(answer_others(one, describe(network, [paths[row] for row in chosen], file, alter)), 1.0)]
        for other in data:
            if other != name:
                others = answer_others(one, features[name][other])
                kinds |= {f"{share:.0%} {other}": [(plain, 1 - share), (others, share)] for share in (0.1, 0.2, 0.5)}
        for kind, parts in kinds.items():
            found = [np.mean([*draw_alarms(rule, decision, parts, size)]) for size in BATCHES]
            print(f"| {name} | {kind} | {' | '.join(f'{value:.2f}' for value in found)} |")
        start = time.perf_counter()
        one.reference.find_neighbours(features[name][name].units)
        seconds = (time.perf_counter() - start) / len(data[name].paths)
        print(f"{name}: comparing a photo with {len(one.reference.paths)} training photos takes {1e3 * seconds:.3f} ms")


def list_tested(known: Known, photos: Photos, test: np.ndarray) -> list[str]:
    """Returns the paths of the test photos."""
    trained = {*known.reference.paths}
    others = [path for path in map(str, photos.paths) if path not in trained]
    return [others[row] for row in test]


def draw_alarms(
    rule: Abstention, decision: Decision, parts: Sequence[tuple[tuple[np.ndarray, np.ndarray], float]], size: int
) -> Iterator[bool]:
    """Yields for random batches of photos whether they are warned of.

    Args:
        rule: fitted on the validation photos.
        decision: for the temperature.
        parts: raw probabilities and similarities of photos, and their share of a batch.
        size: photos of a batch.
    """
    rng = np.random.default_rng(size)
    answers = []
    for (raw, similarities), _ in parts:
        calibrated = decision.calibrate(raw)
        answers.append(dataclasses.replace(decision, abstention=rule).decide(calibrated, similarities))
    for _ in range(DRAWS):
        unknown = unsure = 0
        for answer, (_, share) in zip(answers, parts, strict=True):
            rows = rng.integers(len(answer.is_unknown), size=round(share * size))
            unknown, unsure = unknown + answer.is_unknown[rows].sum(), unsure + answer.is_unsure[rows].sum()
        yield bool(find_excess(rule, int(unknown), int(unsure), size))


if __name__ == "__main__":
    main()
