"""A check of the attributes of an HDF5 file: damaged ones make HDF5 1.14 crash or loop for ever."""

from __future__ import annotations

import subprocess
import sys

import h5py

MOST_SECONDS = 20


def check_attributes(path: str) -> None:
    """Raises ValueError if the attributes of an HDF5 file cannot be read; a separate process tries it."""
    # -P keeps this folder out of sys.path, where its modules could hide others.
    command = [sys.executable, "-P", __file__, path]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=MOST_SECONDS, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ValueError("The texts in it are damaged.") from error


def read_attributes(path: str) -> None:
    """Reads all attributes of an HDF5 file; if they are damaged, it fails in any way or never returns."""
    with h5py.File(path) as file:
        dict(file.attrs)

        def read(_: str, part: h5py.Group | h5py.Dataset) -> None:
            dict(part.attrs)

        file.visititems(read)


if __name__ == "__main__":
    read_attributes(sys.argv[1])
