"""The attributes of HDF5 files, which are text of any length: damaged, they make HDF5 1.14 crash or never return."""

from __future__ import annotations

import subprocess
import sys

import h5py

MOST_SECONDS = 20


def check_attributes(path: str) -> None:
    """Raises ValueError where the attributes of an HDF5 file cannot be read; a process of its own tries it."""
    # Without this folder among those that modules come from: its names are not those of h5py's modules.
    command = [sys.executable, "-P", __file__, path]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=MOST_SECONDS, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ValueError("The texts in it are damaged.") from error


def read_attributes(path: str) -> None:
    """Reads all attributes of an HDF5 file; raises an exception of any kind, or does not end, where it is damaged."""
    with h5py.File(path) as file:
        dict(file.attrs)

        def read(_: str, part: h5py.Group | h5py.Dataset) -> None:
            dict(part.attrs)

        file.visititems(read)


if __name__ == "__main__":
    read_attributes(sys.argv[1])
