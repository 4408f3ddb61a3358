import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest

from finetune.core.options import UserError
from finetune.models import hdf5_attributes
from finetune.models.hdf5_attributes import check_attributes
from finetune.models.model_files import load_model

# Starts the heap of texts: 16 bytes of its own, then the number, uses and length of each text.
HEAP = b"GCOL"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = '{"class_name": "Functional"}'
        layers = file.create_group("model_weights/dense")
        layers.attrs["weight_names"] = np.array(["kernel", "bias"], object)
        layers["kernel"] = np.ones((2, 3), "float32")
    return path


def test_sound_attributes_pass_also_in_an_open_file(path):
    before = path.read_bytes()
    with h5py.File(path):
        check_attributes(str(path))
    assert path.read_bytes() == before


@pytest.mark.slow
def test_hdf5_that_never_returns_is_ended(path, monkeypatch):
    content = bytearray(path.read_bytes())
    first = content.index(HEAP) + 16
    # HDF5 takes zeros for free space of no bytes, and goes on by that number.
    content[first : first + 64] = bytes(64)
    path.write_bytes(content)
    monkeypatch.setattr(hdf5_attributes, "MOST_SECONDS", 4)
    with pytest.raises(ValueError, match="texts"):
        check_attributes(str(path))


def test_hdf5_that_crashes_does_so_alone(path):
    content = bytearray(path.read_bytes())
    # The kind of values of any length, behind a name of 12 letters and its padding: 1 is a text, 2 is not defined.
    kind = content.index(b"weight_names") + 17
    assert content[kind] == 1
    content[kind] = 2
    path.write_bytes(content)
    # -P, as otherwise modules next to it such as formats.py could hide others.
    command = [sys.executable, "-P", hdf5_attributes.__file__, str(path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGSEGV
    with pytest.raises(ValueError, match="texts"):
        check_attributes(str(path))


def test_the_loader_refuses_damaged_attributes(path):
    path.write_bytes(path.read_bytes().replace(HEAP, b"GAOL"))
    with pytest.raises(UserError, match=r"model\.h5 is not a model .*texts"):
        load_model(str(path))
