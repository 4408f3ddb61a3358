import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from finetune.core.options import UserError
from finetune.models import hdf5_attributes
from finetune.models.hdf5_attributes import check_attributes
from finetune.models.model_files import load_model

HEAP = b"GCOL"  # what texts of any length lie behind: 16 bytes of its own, then each text's number, uses and length


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = '{"class_name": "Functional"}'
        layers = file.create_group("model_weights/dense")
        layers.attrs["weight_names"] = np.array(["kernel", "bias"], object)
        layers["kernel"] = np.ones((2, 3), "float32")
    return path


def test_sound_attributes_pass(path):
    before = path.read_bytes()
    check_attributes(str(path))
    assert path.read_bytes() == before


def test_a_file_that_is_open_already_passes(path):
    with h5py.File(path):
        check_attributes(str(path))


@pytest.mark.slow
def test_hdf5_that_never_returns_is_ended(path, monkeypatch):
    content = bytearray(path.read_bytes())
    first = content.index(HEAP) + 16
    # Nothing of it is left: HDF5 takes it for free space of no bytes, and goes on by as many.
    content[first : first + 64] = bytes(64)
    path.write_bytes(content)
    monkeypatch.setattr(hdf5_attributes, "MOST_SECONDS", 4)
    with pytest.raises(ValueError, match=r"The texts in it are damaged\."):
        check_attributes(str(path))


def test_hdf5_that_crashes_does_so_alone(path):
    content = bytearray(path.read_bytes())
    # The kind of values of any length, behind a name of 12 letters and its padding: 1 is a text, 2 is not defined.
    kind = content.index(b"weight_names") + 17
    assert content[kind] == 1
    content[kind] = 2
    path.write_bytes(content)
    command = [sys.executable, "-P", hdf5_attributes.__file__, str(path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGSEGV
    with pytest.raises(ValueError, match=r"The texts in it are damaged\."):
        check_attributes(str(path))


def test_the_loader_tells_it_in_one_line(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(HEAP, b"GAOL"))
    message = r"is not a model that Keras reads: The texts in it are damaged\. Copy it again, or name another\."
    with pytest.raises(UserError, match=message):
        load_model(str(path))


def test_modules_of_this_package_do_not_stand_in_for_others(path):
    assert {"losses", "safety"} <= {file.stem for file in Path(hdf5_attributes.__file__).parent.glob("*.py")}
    check_attributes(str(path))
