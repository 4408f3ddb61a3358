"""Thousands of damaged inputs: each ends soon in a result or an error for the user, and writes nothing elsewhere."""

import contextlib
import faulthandler
import functools
import io
import json
import operator
import os
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import hypothesis.configuration
import keras
import numpy as np
import pytest
from corpus import BAD_TABLES, images, oriented_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress_weights import CompressConfigs
from configs import Configs
from finetune.core.options import UserError
from finetune.data.images import read_image
from finetune.data.inspection import inspect_image
from finetune.data.label_tables import TableForm, convert_label_table
from finetune.data.tables import encode_labels, read_table, resolve_class_names
from finetune.evaluation.decision import Decision, read_decision
from finetune.models import hdf5_attributes
from finetune.models.compressed import custom_save_model
from finetune.models.description import DESCRIPTION_MEMBER, find_description
from finetune.models.model_files import load_model
from finetune.reporting.cam_pictures import name_outputs, write_image
from finetune.reporting.figures import read_log
from finetune.training.resuming import STATE_MEMBER, STATE_PARTS, read_state, save_checkpoint
from make_csv_from_folders import FolderConfigs
from plot_training_log import PlotConfigs
from predict import PredictConfigs
from split_train_test import SplitConfigs

# Pillow and Keras warn about damaged files thousands of times.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

# Hypothesis keeps no examples, but other files of its own.
hypothesis.configuration.set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis-"))

LONGEST_CASE = 10  # seconds of CPU time
MOST_MEMORY = 2 * 2**30
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python announces these events before they happen. None may.
STARTING = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")

watched = {"folder": None, "faults": []}


def watch(event, arguments):
    """Notes what a case does outside its folder; an audit hook of Python."""
    folder = watched["folder"]
    if folder is None:
        return
    # A separate process reads the attributes of HDF5 files.
    if event in STARTING and not (event == "subprocess.Popen" and hdf5_attributes.__file__ in arguments[1]):
        watched["faults"].append((event, arguments))
    paths = []
    if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & WRITING:
        paths = arguments[:1]
    elif event in CHANGING:
        paths = [path for path in arguments[: 2 if event in ("os.rename", "os.link") else 1] if isinstance(path, str)]
    outside = [path for path in paths if not os.path.realpath(path).startswith(folder)]
    watched["faults"] += [(event, path) for path in outside if path != os.devnull]


sys.addaudithook(watch)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder inside another one that must not change; checks that folder and the memory at the end."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "bait.txt").write_text("bait")
    monkeypatch.chdir(inside)
    monkeypatch.setattr(tempfile, "tempdir", str(inside))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield inside
    watched["folder"] = None
    keras.utils.clear_session()
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert taken < MOST_MEMORY
    assert sorted(os.listdir(tmp_path)) == ["bait.txt", "inside"]
    assert (tmp_path / "bait.txt").read_text() == "bait"


def attempt(function, *arguments):
    """Runs one case, which ends in a result or a UserError; returns the result, or None."""
    watched.update(folder=os.path.realpath(os.getcwd()), faults=[])
    start = time.process_time()
    faulthandler.dump_traceback_later(6 * LONGEST_CASE, exit=True)
    try:
        result = function(*arguments)
    except UserError:
        result = None
    finally:
        faulthandler.cancel_dump_traceback_later()
        watched["folder"] = None
    assert time.process_time() - start < LONGEST_CASE
    assert not watched["faults"]
    return result


def fuzz(number, **strategies):
    """Decorates a test to run so many cases, the same in every run."""

    def decorate(test):
        options = {"deadline": None, "derandomize": True, "database": None}
        options["suppress_health_check"] = list(HealthCheck)
        return settings(max_examples=number, **options)(given(**strategies)(test))

    return decorate


@st.composite
def damaged(draw, contents):
    """Draws one of some files, cut short, with flipped bits, or with a part overwritten, repeated or left out."""
    content = bytearray(draw(st.sampled_from(contents)))
    positions = st.integers(0, max(len(content) - 1, 0))
    kind = draw(st.sampled_from(["cut", "flip", "flip", "flip", "overwrite", "zero", "drop", "repeat"]))
    start, length = draw(positions), draw(st.integers(1, 64))
    if kind == "cut":
        return bytes(content[:start])
    if kind == "flip":
        # The header is damaged more often than the rest.
        for position in draw(st.lists(positions | st.integers(0, min(511, len(content) - 1)), min_size=1, max_size=8)):
            content[position] ^= 1 << draw(st.integers(0, 7))
    elif kind == "overwrite":
        part = draw(st.binary(min_size=1, max_size=16))
        content[start : start + len(part)] = part
    elif kind == "zero":
        content[start : start + length] = bytes(length)
    elif kind == "drop":
        del content[start : start + length]
    else:
        content[start:start] = content[start : start + length]
    return bytes(content)


# Tables


WORDS = st.sampled_from(["path", "class", "cat", "dog", "cat$dog", "$", "cat$", "a.jpg", "../b.jpg", " ", "", '"', "'"])
CELLS = WORDS | st.text(max_size=12)
SEPARATORS = st.sampled_from([",", ",", ",", ";", "\t", "|"])
ROWS = st.lists(st.lists(CELLS, max_size=4), max_size=6)


@st.composite
def tables(draw):
    separator, end = draw(SEPARATORS), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    rows = [draw(st.sampled_from([["path", "class"], ["path"], ["class", "path", "note"], []])), *draw(ROWS)]
    text = end.join(separator.join(row) for row in rows)
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])), "replace")


def read_labels(path, multi_label):
    class_names = resolve_class_names(None, path, "class", multi_label)
    labels = read_table(path, "class", multi_label)["class"]
    return encode_labels(labels, class_names, multi_label, path), class_names


@fuzz(600, content=tables() | damaged(sorted(BAD_TABLES.values(), key=len)[2:]), multi_label=st.booleans())
def test_tables(folder, content, multi_label):
    Path("table.csv").write_bytes(content)
    result = attempt(read_labels, "table.csv", multi_label)
    if result is not None:
        labels, class_names = result
        assert class_names == sorted(set(class_names))
        assert len(labels) > 0
        assert labels.max() < (2 if multi_label else len(class_names))


IDS = st.sampled_from(["0001", "0002", "a/0003", "a\\0003.jpg", "0009", "", " 0001 "])
LABEL_CELLS = IDS | st.sampled_from(["0", "1", "1.0", "True", "cat", "cat$dog", "$", "id", "class"]) | CELLS
PHOTOS = ["photos/0001.jpg", "photos/0002.png", "photos/a/0003.jpg"]
LABEL_TABLES = [b"id,class\n0001,cat\n0002,dog\n", b"sep=;\nid;cat;dog\n0001;1;0\na/0003;0;1\n"]
LABEL_TABLES.append("id\tclass\n0001\tcat\n".encode("utf-16"))


@st.composite
def label_tables(draw):
    separator, start = draw(SEPARATORS), draw(st.sampled_from(["", "", "sep=;\n", "\n"]))
    header = draw(st.sampled_from([["id", "class"], ["id", "cat", "dog"], ["", "id", "a", "b"]]) | st.lists(CELLS))
    rows = draw(st.lists(st.lists(LABEL_CELLS, min_size=len(header), max_size=len(header)), max_size=5))
    text = start + "\n".join(separator.join(row) for row in [header, *rows])
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])), "replace")


@fuzz(
    450,
    content=label_tables() | tables() | damaged(LABEL_TABLES),
    given=st.booleans(),
    multi_label=st.booleans(),
    mark=st.sampled_from("$|1 "),
    skip=st.booleans(),
)
def test_label_tables(folder, content, given, multi_label, mark, skip):
    for path in PHOTOS:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    Path("labels.csv").write_bytes(content)
    table = attempt(convert_label_table, "labels.csv", "photos", TableForm("class", given, "", multi_label, mark), skip)
    if table is not None:
        assert list(table.columns) == ["path", "class"]
        assert len(table) > 0
        assert {*table["path"]} <= {*PHOTOS}
        assert all(table["class"])
        assert not multi_label or table["path"].is_unique


@fuzz(200, content=damaged([b"epoch,loss,val_loss\n1,0.5,0.6\n2,0.4,nan\n"]) | tables() | st.binary(max_size=60))
def test_training_logs(folder, content):
    Path("training_log.csv").write_bytes(content)
    log = attempt(read_log, "training_log.csv")
    assert log is None or {"epoch", "loss"} <= set(log)


# Options and decisions


NAMES = st.sampled_from(sorted(Configs.options())) | st.text(max_size=20)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63, 2**1024, 1e308, 5e-324])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(st.characters(), max_size=10)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3))


@st.composite
def json_files(draw, objects):
    content = json.dumps(draw(objects), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return draw(st.just(content) | damaged([content]))


@fuzz(750, content=json_files(st.dictionaries(NAMES, VALUES, max_size=4)) | st.binary(max_size=40))
def test_configs_files(folder, content):
    Path("configs.json").write_bytes(content)
    configs = attempt(lambda: Configs.from_json("configs.json").validate())
    if configs is not None:
        # Valid configs can be written and read again.
        Path("again.json").write_text(json.dumps(configs.to_dict()))
        assert Configs.from_json("again.json").to_dict() == configs.to_dict()


CONFIGS_CLASSES = (Configs, FolderConfigs, SplitConfigs, PlotConfigs, PredictConfigs, CompressConfigs)
FLAGS = sorted({f"--{name}" for configs_class in CONFIGS_CLASSES for name in configs_class.options()})
FLAG_VALUES = st.sampled_from(["True", "no", "none", "0", "-1", "1e999", "nan", "9" * 400, "9" * 5000, "", "--", "-"])
ARGUMENTS = st.sampled_from([*FLAGS, "--configs"]) | FLAG_VALUES | st.text(max_size=12)


@fuzz(500, configs_class=st.sampled_from(CONFIGS_CLASSES), arguments=st.lists(ARGUMENTS, max_size=5))
def test_command_lines(folder, configs_class, arguments):
    if not {"--help", "-h"} & set(arguments):
        attempt(configs_class.from_command_line, "A script.", arguments)


DECISION = Decision(["cat", "dog"], False).to_dict()
FIELDS = st.sampled_from(sorted(DECISION))


@fuzz(300, content=json_files(st.dictionaries(FIELDS, VALUES, max_size=3).map(lambda fields: DECISION | fields)))
def test_decisions(folder, content):
    Path("decision.json").write_bytes(content)
    decision = attempt(read_decision, ".", ["cat", "dog"], False, "best_model.keras")
    if decision is not None:
        calibrated = decision.calibrate(np.array([[0.25, 0.75], [1, 0]], np.float32))
        assert ((calibrated >= 0) & (calibrated <= 1)).all()
        assert decision.choose(calibrated).shape == (2, 2)


# Images


PICTURES = [content for content in dict.fromkeys(content for _, content in images().values()) if content]
PICTURES += oriented_files(6).values()
SMALL_PICTURES = [content for content in PICTURES if len(content) < 50_000]


@fuzz(750, content=damaged(SMALL_PICTURES), image_size=st.sampled_from([None, (8, 8), (30, 40)]))
def test_images(folder, content, image_size):
    Path("image.jpg").write_bytes(content)
    image = attempt(read_image, "image.jpg", image_size)
    # The full check and training agree.
    assert (inspect_image("image.jpg", decode=True).fault is None) == (image is not None)
    if image is not None:
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.size


# Models


STATE = dict.fromkeys(sorted(STATE_PARTS)) | {"epochs_completed": 1, "log": [{"epoch": 1}], "configs": {}, "given": []}


def build_files():
    """Returns the bytes of a small trained model in each format: `.keras`, `.h5`, and the pair `.h5` and `.json`."""
    inputs = keras.Input((8, 8, 3))
    outputs = keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(keras.layers.Conv2D(2, 3)(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "sparse_categorical_crossentropy")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".keras", ".h5"):
            model.save(f"{folder}/model{suffix}")
        save_checkpoint(model, f"{folder}/checkpoint.keras", STATE, Configs(classes=["a", "b"]).to_dict())
        custom_save_model(model, folder, "pair")
        custom_save_model(model, folder, "int8", "int8")
        names = ("model.keras", "checkpoint.keras", "model.h5", "pair.h5", "pair.json", "int8.h5")
        return {name: Path(folder, name).read_bytes() for name in names}


FILES = build_files()
with zipfile.ZipFile(io.BytesIO(FILES["model.keras"])) as opened:
    PARTS = {name: opened.read(name) for name in opened.namelist()}
LAYERS = json.loads(FILES["pair.json"])


def pack(parts, packing=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def list_places(part, place=()):
    """Returns the keys that lead to each value of parsed JSON."""
    inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    return [place, *(found for key, value in inner for found in list_places(value, (*place, key)))]


PLACES = list_places(LAYERS)[1:]
FOREIGN = st.sampled_from(
    ["Lambda", "os", "keras.utils", "get_file", "system", "builtins", "eval", "Dense", "__lambda__"]
)


@st.composite
def changed_layers(draw):
    """Draws the layers of the model as JSON with one to three values replaced."""
    layers = json.loads(FILES["pair.json"])
    for place in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        # An earlier change may have removed the place.
        with contextlib.suppress(KeyError, IndexError, TypeError):
            target = functools.reduce(operator.getitem, place[:-1], layers)
            target[place[-1]]
            target[place[-1]] = draw(VALUES | FOREIGN | st.integers(-2, 10**6))
    return json.dumps(layers).encode("utf-8", "surrogatepass")


ARCHIVES = st.one_of(
    damaged([FILES["model.keras"], FILES["checkpoint.keras"]]),
    # Valid archives with damaged parts.
    changed_layers().map(lambda content: pack(PARTS | {"config.json": content})),
    damaged([PARTS["config.json"]]).map(lambda content: pack(PARTS | {"config.json": content})),
    damaged([PARTS["model.weights.h5"]]).map(lambda content: pack(PARTS | {"model.weights.h5": content})),
    st.text(max_size=20).map(lambda name: pack(PARTS | {name or "x": b"x"}, zipfile.ZIP_DEFLATED)),
)


@fuzz(150, content=ARCHIVES, with_optimizer=st.booleans())
def test_keras_files(folder, content, with_optimizer):
    Path("model.keras").write_bytes(content)
    assert isinstance(attempt(load_model, "model.keras", with_optimizer), keras.Model | None)


@fuzz(150, content=damaged([FILES["model.h5"]]), with_optimizer=st.booleans())
def test_hdf5_files(folder, content, with_optimizer):
    Path("model.h5").write_bytes(content)
    assert isinstance(attempt(load_model, "model.h5", with_optimizer), keras.Model | None)


@fuzz(
    150,
    layers=changed_layers() | damaged([FILES["pair.json"]]) | st.just(FILES["pair.json"]),
    weights=damaged([FILES["pair.h5"], FILES["int8.h5"]]) | st.just(FILES["pair.h5"]),
)
def test_compressed_models(folder, layers, weights):
    Path("model.h5").write_bytes(weights)
    Path("model.json").write_bytes(layers)
    assert isinstance(attempt(load_model, "model.h5"), keras.Model | None)


@fuzz(300, content=damaged([FILES["checkpoint.keras"], pack({STATE_MEMBER: json.dumps(STATE)})]))
def test_states(folder, content):
    Path("latest_model.keras").write_bytes(content)
    state = attempt(read_state, "latest_model.keras")
    assert state is None or state == STATE


@fuzz(
    300,
    content=json_files(
        st.fixed_dictionaries({"options": st.dictionaries(NAMES, VALUES, max_size=4), "decision": VALUES})
    ),
)
def test_descriptions(folder, content):
    Path("model.keras").write_bytes(pack({DESCRIPTION_MEMBER: content}))
    found = attempt(find_description, "model.keras")
    assert found is None or found.options.keys() <= Configs.options().keys()
    assert attempt(read_decision, ".", ["a", "b"], False, "model.keras") in (None, Decision(["a", "b"], False))


# File names


PATH_PARTS = st.sampled_from(["..", ".", "CON", "a", ".hidden", "a\\b", "C:", "花" * 90]) | st.text(max_size=300)


@fuzz(150, parts=st.lists(st.lists(PATH_PARTS, min_size=1, max_size=4), min_size=1, max_size=4))
def test_names_of_pictures(folder, parts):
    names = attempt(name_outputs, ["/".join(part) + ".jpg" for part in parts])
    assert len({name.casefold() for name in names}) == len(parts)
    output = Path("cam_output")
    for name in names:
        attempt(write_image, f"cam_output/{name}", np.zeros((2, 2, 3), np.uint8))
    assert sorted(os.listdir(output)) == sorted(names)
    shutil.rmtree(output)


def test_hypothesis_leaves_no_folder():
    assert not (Path(__file__).resolve().parent.parent / ".hypothesis").exists()
