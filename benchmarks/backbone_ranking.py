"""How far compare_backbones.py's ranking by a probe predicts the ranking after fine-tuning; prints a table a data set.

python benchmarks/backbone_ranking.py --data flowers=FOLDER --data signs=FOLDER --sizes 96 144 224

FOLDER holds one folder per class; NAME=CSV:IMAGE_FOLDER as recipes.py takes it. The candidates are MobileNet at each
size, and without ImageNet weights at the smallest one, the floor. Each is ranked on the training and validation photos
by compare_backbones.py; then trained on them with the recommended options and tested on photos that had no part in
either, divided as recipes.py does. Printed are both figures of each, Kendall's tau of the two orders, and the regret:
what the candidate that the probe ranks first has less on the test photos than the best one, with the 95 % interval of
that difference photo by photo.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.recipe_photos import Photos, read_photos, select_truth, vary_size, write_tables  # noqa: E402
from benchmarks.recipes import FIGURES, Place, parse_data, run_script  # noqa: E402
from finetune.core.files import write_csv  # noqa: E402
from finetune.evaluation.paired_comparison import compare_scores, score_images  # noqa: E402
from finetune.studies.backbone_comparison import TOLD_APART  # noqa: E402

BACKBONE = "MobileNet"
RECOMMENDED = PROJECT / "data" / "recommended.json"


class Candidate(NamedTuple):
    """A backbone and what is known of it.

    Attributes:
        name: in the table.
        options: of `train.py` and `compare_backbones.py`.
    """

    name: str
    options: tuple[str, ...]


class Outcome(NamedTuple):
    """What a candidate gave.

    Attributes:
        probe: the figure out of fold.
        tuned: the figure of the test photos, fine-tuned.
        scores: of each test photo, `(photos,)`.
    """

    probe: float
    tuned: float
    scores: np.ndarray


def main() -> None:
    """Compares, trains and tests all candidates on every data set, and prints what the ranking was worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, action="append", type=parse_data, metavar="NAME=PLACE")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 144, 224], metavar="PIXELS")
    parser.add_argument("--train_per_class", type=int, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of training")
    arguments = parser.parse_args()
    candidates = list_candidates(sorted(arguments.sizes))
    for place in arguments.data:
        photos = read_set(place, arguments.train_per_class, arguments.seed)
        with tempfile.TemporaryDirectory() as folder:
            outcomes = {one.name: run(one, photos, arguments.seed, folder) for one in candidates}
        print(f"\n{photos.name}\n{describe(outcomes)}", flush=True)


def list_candidates(sizes: list[int]) -> list[Candidate]:
    """Returns MobileNet at each size, and with random weights at the first."""
    found = [Candidate(f"{size}", ("--image_target_size", str(size), str(size), "3")) for size in sizes]
    # Batch normalisation changes an untrained network's features by orders of magnitude: no probe can start there.
    floor = (*found[0].options, "--use_imagenet_weights", "False", "--head_initialization", "random")
    floor += ("--model_selection", "last_epoch")
    return [*found, Candidate(f"{sizes[0]}, random weights", floor)]


def read_set(place: Place, per_class: int, seed: int) -> Photos:
    """Returns a data set's photos, so many of each class to train on."""
    return vary_size(read_photos(place.name, place.path), [per_class], [seed])[0]


def run(candidate: Candidate, photos: Photos, seed: int, folder: str) -> Outcome:
    """Ranks a candidate by the probe, then trains and tests it."""
    sets = write_tables(photos, seed, folder)
    known = f"{folder}/known.csv"
    write_csv(known, pd.concat([pd.read_csv(sets[name]) for name in ("training", "validation")]))
    model = [*candidate.options, "--visual_model_name", BACKBONE, "--random_seed", str(seed)]
    model += ["--multi_label_classification", str(photos.multi_label), "--configs", RECOMMENDED]
    ranked, trained = f"{folder}/ranking.csv", f"{folder}/run"
    compared = ["--backbones", BACKBONE, "--train_csv", known, "--write_path", ranked]
    compared += ["--image_cache_path", f"{folder}/cache"]
    run_script([PROJECT / "compare_backbones.py", *model, *compared])
    tables = ["--train_csv", sets["training"], "--validation_csv", sets["validation"], "--test_csv", sets["test"]]
    run_script([PROJECT / "train.py", *model, *tables, "--save_model_path", trained, "--overwrite", "True"])
    run_script([PROJECT / "test.py", "--load_model_path", trained])
    figure = FIGURES[photos.multi_label]
    results = json.loads(Path(trained, "evaluation", "metrics.json").read_text(encoding="utf-8"))
    answers = pd.read_csv(Path(trained, "evaluation", "predictions.csv"))
    probabilities = answers[[f"probability_{name}" for name in photos.class_names]].to_numpy()
    scores = score_images(select_truth(photos, seed), probabilities)
    outcome = Outcome(pd.read_csv(ranked)[figure][0], results["sets"]["test"][figure], scores)
    print(f"{photos.name}, {candidate.name}: probe {outcome.probe:.3f}, tuned {outcome.tuned:.3f}", flush=True)
    return outcome


def describe(outcomes: dict[str, Outcome]) -> str:
    """Lays out both figures of each candidate, and says how far one order tells the other."""
    probed, tuned = ([one[place] for one in outcomes.values()] for place in (0, 1))
    rows = [f"| {name} | {one.probe:.3f} | {one.tuned:.3f} |" for name, one in outcomes.items()]
    names = list(outcomes)
    chosen, best = names[int(np.argmax(probed))], names[int(np.argmax(tuned))]
    difference, error = compare_scores(outcomes[chosen].scores, outcomes[best].scores)
    low, high = difference - TOLD_APART * error, difference + TOLD_APART * error
    lines = ["| MobileNet at | probe, out of fold | fine-tuned, test |", "|---|---|---|", *rows, ""]
    lines.append(f"Kendall's tau: {stats.kendalltau(probed, tuned).statistic:.2f}")
    lines.append(
        f"The probe's first, {chosen}, has {difference:.3f} less than the best, {best} ({low:.3f} to {high:.3f})"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
