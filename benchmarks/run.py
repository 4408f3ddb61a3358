"""Measures what the project promises, as ratios within one run; prints a table and writes benchmarks/results.json.

pip install -r benchmarks/requirements.txt
python benchmarks/run.py --images FOLDER    where FOLDER holds one folder per class; by default generated photos
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from photos import generate_photos

HERE = Path(__file__).resolve().parent
REPEATS = 3
ROWS = (10_000, 100_000, 1_000_000)
PEERS = ("tf_data", "tf_data_once", "pytorch", "pytorch_once")
ONE_CORE = ("decode_full", "decode_scaled", "classical", *PEERS, "ours")
ONE_CORE += ("ours_plain", "ours_memory", "ours_disk")
# Name, measured value, `at least` or `at most`, and the bound.
Row = tuple[str, float, str, float]


def main() -> None:
    """Runs every benchmark, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder with one folder per class; by default photos are generated")
    parser.add_argument("--against", metavar="COMMIT", help="also measure the generator of this commit")
    parser.add_argument("--loaders_only", action="store_true", help="only measure the loaders")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as past:
        images = arguments.images or generate_photos(folder)
        if arguments.against:
            unpack_commit(arguments.against, past)
        loaders = measure_loaders(images, past if arguments.against else None)
        if arguments.loaders_only:
            print_rows(rows_of_loaders(loaders))
            return
        results = {
            "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
            "loaders": loaders,
            **measure_training(images),
            "tables": {name: measure_table(name) for name in table_tasks()},
            "data_check": run_alone("data_check.py", images),
            "compression": measure_compression(),
        }
    rows = [*rows_of_loaders(results["loaders"]), *rows_of_training(results), *rows_of_tables(results["tables"])]
    rows += [*rows_of_data_check(results["data_check"]), *rows_of_compression(results["compression"])]
    print_rows(rows)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def print_rows(rows: list[Row]) -> None:
    """Prints the table of measured values and promises."""
    print("\n| what | measured | promised | |\n|---|---|---|---|")
    for what, value, sign, bound in rows:
        holds = value >= bound if sign == "at least" else value <= bound
        print(f"| {what} | {value:.3g} | {sign} {bound} | {'holds' if holds else 'missed'} |")


def unpack_commit(commit: str, folder: str) -> None:
    """Writes the files of a commit of this project into a folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=HERE.parent, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def run_alone(script: str, *arguments: str, folder: Path = HERE) -> list[float]:
    """Runs a script of a folder in its own process; returns the numbers of its last line."""
    done = subprocess.run([sys.executable, folder / script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stderr}")
    return [float(word) for word in done.stdout.split("\n")[-2].split()]


def measure_loaders(images: str, past: str | None) -> dict[str, float]:
    """Returns the median images/s of each contender, measured in turns, so that a busy machine affects all alike.

    Args:
        images: one folder per class.
        past: a folder with an earlier commit, whose generator is called `before`, or None.

    Returns:
        Images/s by `NAME, CORES`; the milliseconds of `lock.py` as `lock` and `outside`.
    """
    contenders = [(name, 1) for name in ONE_CORE] + [("ours", 2), ("processes", 2), ("decode_processes", 2)]
    contenders += [("before", 1)] * (past is not None)
    rates = {contender: [] for contender in contenders}
    for _ in range(REPEATS):
        for name, cores in contenders:
            task = ("ours", Path(past, "benchmarks")) if name == "before" else (name, HERE)
            rates[name, cores] += run_alone("loaders.py", task[0], images, str(cores), folder=task[1])
            print(f"{name}, {cores} core(s): {rates[name, cores][-1]:.0f} images/s", flush=True)
    under, outside = run_alone("lock.py", images)
    medians = {f"{name}, {cores}": float(np.median(values)) for (name, cores), values in rates.items()}
    return {**medians, "lock": under, "outside": outside}


def measure_training(images: str) -> dict[str, dict[str, float]]:
    """Returns the results of `training.py`."""
    import training

    paths = sorted(map(str, Path(images).glob("*/*")))
    return {
        "fit": training.measure_fit(paths),
        "appetites": training.measure_appetites(paths),
        "grad_cam": training.measure_grad_cam(),
        "checkpoint": training.measure_checkpoint_cost(images),
        "drawing_mib": {str(number): run_alone("training.py", str(number))[0] for number in (500, 1000)},
    }


def table_tasks() -> list[str]:
    """Returns the names of the tasks of `tables.py`."""
    import tables

    return list(tables.TASKS)


def measure_table(name: str) -> dict[str, list[float]]:
    """Returns seconds and MiB for each of `ROWS`."""
    results = [run_alone("tables.py", name, str(rows)) for rows in ROWS]
    print(f"{name}: {results}", flush=True)
    return {"rows": list(ROWS), "seconds": [result[0] for result in results], "mib": [result[1] for result in results]}


def measure_compression() -> dict[str, list[float]]:
    """Returns the results of `compression.py` by backbone."""
    import compression

    return {name: run_alone("compression.py", name) for name in compression.BACKBONES}


def rows_of_loaders(rates: dict[str, float]) -> list[Row]:
    """Returns the table's rows on reading images."""
    ours, limit = rates["ours, 1"], rates["decode_full, 1"]
    peer = max(rates[f"{name}, 1"] for name in PEERS)
    both = rates["decode_processes, 2"] / rates["decode_scaled, 1"]
    before = [("generator / generator before, one core", ours / rates["before, 1"], "at least", 1.3)]
    return [
        *(before if "before, 1" in rates else []),
        ("generator / classical loader, one core", ours / rates["classical, 1"], "at least", 14),
        ("generator / better of tf.data and PyTorch, one core", ours / peer, "at least", 2.2),
        ("generator / decoding alone, one core", ours / limit, "at least", 0.55),
        ("generator / decoding alone at the generator's scale", ours / rates["decode_scaled, 1"], "at least", 0.55),
        ("milliseconds an image under Python's lock", rates["lock"], "at most", 0.1),
        ("generator, 2 threads / 1 thread", rates["ours, 2"] / ours, "at least", 1.85),
        ("decoding alone, 2 processes / 1, what the cores can do", both, "at least", 1.7),
        ("generator, 2 processes / 2 threads", rates["processes, 2"] / rates["ours, 2"], "at least", 0.9),
        ("memory cache, not augmented / decoding alone", rates["ours_memory, 1"] / limit, "at least", 3),
        ("disk cache, not augmented / decoding alone", rates["ours_disk, 1"] / limit, "at least", 3),
    ]


def rows_of_training(results: dict) -> list[Row]:
    """Returns the table's rows on training and explaining."""
    fit, cam, memory = results["fit"], results["grad_cam"], results["drawing_mib"]
    rows = []
    for name, appetite in results["appetites"].items():
        print(f"{name}: {appetite['memory']:.0f} images/s from memory, {appetite['files']:.0f} from files")
        rows.append((f"fit on files / on a batch in memory, {name}, GPU", appetite["ratio"], "at least", 0.95))
        rows.append((f"input_wait, {name}, GPU", appetite["input_wait"], "at most", 0.1))
    return [
        *rows,
        ("fit on files / on a batch in memory, MobileNet", fit["ratio"], "at least", 0.95),
        ("input_wait, MobileNet", fit["input_wait"], "at most", 0.1),
        ("Grad-CAM / with a model built per image", cam["batched"] / cam["rebuilt_per_image"], "at least", 10),
        ("Grad-CAM / predict", cam["batched"] / cam["predict"], "at least", 0.7),
        ("draw_activations.py, memory for 1,000 / 500 images", memory["1000"] / memory["500"], "at most", 1.1),
        ("checkpoint's share of an epoch, MobileNet", results["checkpoint"]["share"], "at most", 0.05),
    ]


def rows_of_tables(results: dict[str, dict[str, list[float]]]) -> list[Row]:
    """Returns the table's rows on tables of a million rows."""
    rows = []
    for name, result in results.items():
        rows.append((f"{name}, 10^6 rows, seconds", result["seconds"][-1], "at most", 15))
        rows.append((f"{name}, 10^6 rows, GiB", result["mib"][-1] / 1024, "at most", 1))
        rows.append((f"{name}, 10^6 / 10^5 rows", result["seconds"][-1] / result["seconds"][-2], "at most", 15))
    return rows


def rows_of_data_check(results: list[float]) -> list[Row]:
    """Returns the table's rows on the check before training."""
    return [
        ("full data check / decoding alone, one core", results[0], "at least", 0.8),
        ("quick data check, files/s on one core", results[1], "at least", 2000),
        ("strict decoding / OpenCV's, whole pictures, one core", results[2], "at least", 0.9),
    ]


def rows_of_compression(results: dict[str, list[float]]) -> list[Row]:
    """Returns the table's rows on compressed weights: the promises for float32, float16 and int8 in their order."""
    rows = []
    for name, values in results.items():
        kinds = zip(("float32", "float16", "int8"), values[:3], values[3:], (3, 6, 11), strict=True)
        for dtype, smaller, faster, bound in kinds:
            rows.append((f"checkpoint / {dtype} weights, bytes, {name}", smaller, "at least", bound))
            rows.append((f"checkpoint / {dtype} weights, seconds to load, {name}", faster, "at least", 2))
    return rows


if __name__ == "__main__":
    main()
