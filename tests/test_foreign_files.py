"""Files from elsewhere are refused, repaired or warned of in one line, run no code and write nothing elsewhere."""

import ast
import functools
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from corpus import check_message

import compress_weights
import draw_activations
import predict
import test as evaluation
import train
from configs import Configs
from finetune.core.files import TEMPORARY_PREFIX
from finetune.core.options import UserError
from finetune.data.images import read_image
from finetune.data.inspection import inspect_image
from finetune.evaluation.decision import Decision, read_decision, write_decision
from finetune.models.compressed import custom_save_model
from finetune.models.description import describe_model
from finetune.models.model_files import load_fitting_model, load_model
from finetune.predicting.predicting import load_exported_model
from finetune.reporting import cam_pictures
from finetune.reporting.cam_pictures import name_outputs
from finetune.reporting.figures import read_log
from finetune.training.trained_model import resolve_model_path

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["cat", "dog", "owl"]
SUFFIXES = (".keras", ".h5", ".hdf5", "compressed")


def build_model(*middle, image_size=(8, 8)):
    layers = [keras.Input((*image_size, 3)), keras.layers.Conv2D(2, 3), *middle, keras.layers.Flatten()]
    return keras.Sequential([*layers, keras.layers.Dense(3, activation="softmax")])


def with_lambda():
    return build_model(keras.layers.Lambda(lambda x: x * 2))


def write_model(folder, suffix, model):
    if suffix == "compressed":
        return custom_save_model(model, str(folder), "model")[0]
    model.save(folder / f"model{suffix}")
    return str(folder / f"model{suffix}")


@functools.cache
def save_plain(suffix):
    return write_model(Path(tempfile.mkdtemp()), suffix, build_model())


def save(folder, suffix, model=None):
    """Saves a model in one of the formats; returns its path."""
    if model is not None:
        return write_model(folder, suffix, model)
    plain = Path(save_plain(suffix))
    shutil.copytree(plain.parent, folder, dirs_exist_ok=True)
    return str(folder / plain.name)


def change_archive(path, change, **options):
    """Rewrites the parts of an archive; `change` takes and returns them by name."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in change(parts).items():
            archive.writestr(name, content)


def change_layers(path, change):
    """Rewrites the description of the layers in a model file; `change` alters the parsed JSON."""

    def rewrite(text):
        layers = json.loads(text)
        return json.dumps(change(layers) or layers)

    layers_path = Path(path).with_suffix(".json")
    if path.endswith(".keras"):
        change_archive(path, lambda parts: parts | {"config.json": rewrite(parts["config.json"])})
    elif layers_path.exists():
        layers_path.write_text(rewrite(layers_path.read_text()))
    else:
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = rewrite(file.attrs["model_config"])


def last_layer(**changes):
    """Returns a change of the last layer of a model file."""
    return lambda path: change_layers(path, lambda layers: layers["config"]["layers"][-1].update(changes))


def last_options(**options):
    """Returns a change of the last layer's options in a model file."""
    return lambda path: change_layers(path, lambda layers: layers["config"]["layers"][-1]["config"].update(options))


def function_of(module, name):
    return {"class_name": "function", "module": module, "config": name, "registered_name": name}


def loading(suffix, change):
    """Returns a case: a model file is saved, changed and loaded."""

    def run(folder):
        path = save(folder, suffix)
        change(path)
        load_model(path)

    return run


def parts_of(change, **options):
    return loading(".keras", lambda path: change_archive(path, change, **options))


def bytes_of(change, suffix=".keras"):
    return loading(suffix, lambda path: Path(path).write_bytes(change(Path(path).read_bytes())))


def layers_of(change):
    return loading(".keras", lambda path: change_layers(path, change))


def json_of(text):
    return loading("compressed", lambda path: Path(path).with_suffix(".json").write_text(text))


def add_bomb(parts):
    return parts | {"model.weights.h5": bytes(2**28 + 2**20)}


def fitting(model, names=CLASSES):
    """Returns a case: a model is loaded for images of 8x8."""
    return lambda folder: load_fitting_model(save(folder, ".keras", model()), names, (8, 8))


def flip_weights(data):
    position = data.index(b"\x89HDF") + 3000
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def weights_of(replace):
    """Returns a case: `replace` takes a compressed model's weights, the first one's name and shape."""

    def change(path):
        with h5py.File(path, "r+") as file:
            name = sorted(file["weights"])[0]
            shape = file["weights"][name].shape
            del file["weights"][name]
            replace(file["weights"], name, shape)

    return loading("compressed", change)


def claim_huge_array(weights, name, shape):
    weights.create_dataset(name, (10**6, 10**6), "f4", chunks=(1000, 1000), compression="gzip")


def point_elsewhere(weights, name, shape):
    weights[name] = h5py.ExternalLink("/etc/other.h5", "weights")


def read_raw_file(weights, name, shape):
    weights.create_dataset(name, shape, "u1", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def two_inputs():
    inputs = [keras.Input((8, 8, 3)), keras.Input((8, 8, 3))]
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(keras.layers.Add()(inputs))))


def one_size_of_batch():
    return keras.Sequential([keras.Input((8, 8, 3), batch_size=4), keras.layers.Flatten(), keras.layers.Dense(3)])


def maps_of_classes():
    return keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(3, 1)])


def of_two_pairs(folder):
    path = save(folder, "compressed", build_model(keras.layers.Conv2D(4, 3)))
    layers = Path(path).with_suffix(".json").read_text()
    path = save(folder, "compressed")
    Path(path).with_suffix(".json").write_text(layers)
    load_model(path)


def half_of_a_pair(folder):
    path = save(folder, "compressed")
    os.remove(Path(path).with_suffix(".json"))
    load_model(path)


def of_scales(scales):
    """Returns a case: an int8 model's kernel has other scales, or none."""

    def run(folder):
        path, _ = custom_save_model(build_model(), str(folder), "model", "int8")
        with h5py.File(path, "r+") as file:
            assert sorted(file["scales"]) == ["00002"]
            del file["scales/00002"]
            if scales is not None:
                file["scales/00002"] = scales
        load_model(path)

    return run


def weights_alone(folder):
    build_model().save_weights(folder / "a.weights.h5")
    load_model(str(folder / "a.weights.h5"))


def written(name, data, read):
    """Returns a case: a file with these bytes is read by its path."""

    def run(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        read(str(folder / name.split("/")[0]))

    return run


def exported(name, data):
    return written(name, data, load_exported_model)


def graph_that_writes(folder):
    """A case: a SavedModel that writes a file."""

    def serve(image):
        tf.io.write_file(str(folder / "mark"), "hello")
        return image[:, 0, 0]

    module = tf.Module()
    module.serve = tf.function(serve, input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.float32, "image")])
    tf.saved_model.save(module, str(folder / "model"), signatures=module.serve)
    load_exported_model(str(folder / "model"))


def metadata_of(value):
    """Returns a case: the description beside an exported model."""

    def read(path):
        describe_model(Configs(), path.replace("_metadata.json", ".onnx"))

    return written("model_metadata.json", json.dumps(value).encode(), read)


def flags(*words):
    return lambda folder: Configs.from_command_line(arguments=words)


def configs_of(data):
    return written("configs.json", data, lambda path: flags("--configs", path)(None))


def decision_of(data=None, **fields):
    """Returns a case: a decision file is read, that of `write_decision` with other `fields`."""

    def run(folder):
        path = Path(write_decision(str(folder), Decision(CLASSES, False)))
        path.write_bytes(data or json.dumps(json.loads(path.read_text()) | fields).encode())
        read_decision(str(folder), CLASSES, False, "best_model.keras")

    return run


def log_of(data):
    return written("training_log.csv", data, read_log)


GET_FILE = function_of("keras.utils", "get_file")
LAYER = keras.saving.serialize_keras_object(keras.layers.Dense(3))
HTML = b"<!DOCTYPE html><html>404 Not Found</html>"
HUGE = b"1" + b"0" * 400
NESTED = "[" * 10**5 + "]" * 10**5
PACKED = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 1}
# Name of a case: how it is made, and the names that its error must contain, separated by "|".
CASES = {
    "model_empty": (bytes_of(lambda _: b""), "model.keras"),
    "model_truncated": (bytes_of(lambda data: data[: len(data) // 2]), "model.keras|zip"),
    "model_damaged": (bytes_of(flip_weights), "model.keras|CRC|model.weights.h5"),
    "model_foreign_archive": (parts_of(lambda _: {"notes.txt": "x"}), "model.keras|config.json"),
    "model_without_weights": (parts_of(lambda p: {"config.json": p["config.json"]}), "model.keras|model.weights.h5"),
    "model_bomb": (parts_of(add_bomb, **PACKED), "model.keras|256 MiB"),
    "model_packed_otherwise": (parts_of(dict, compression=zipfile.ZIP_BZIP2), "model.keras|metadata.json"),
    "model_part_outside": (parts_of(lambda p: p | {"../../outside.txt": "x"}), "model.keras|../../outside.txt"),
    "model_saved_model_layer": (loading(".keras", last_layer(class_name="TFSMLayer")), "model.keras|TFSMLayer"),
    "model_unknown_layer": (loading(".keras", last_layer(class_name="Densest")), "model.keras|Densest"),
    "model_unknown_registered": (loading(".keras", last_layer(module=None, registered_name="a>B")), "model.keras"),
    "model_file_loader": (loading(".keras", last_options(activation=GET_FILE)), "model.keras|get_file"),
    "model_huge_layer": (loading(".keras", last_options(units=10**12)), "model.keras|256 MiB"),
    "model_huge_number": (loading(".keras", last_options(units=10**400)), "model.keras|256 MiB"),
    "model_negative_number": (loading(".keras", last_options(units=-3)), "model.keras|units=-3"),
    "model_layers_as_text": (layers_of(lambda _: "Sequential"), "model.keras|layers"),
    "model_a_layer_alone": (layers_of(lambda _: LAYER), "model.keras|Dense"),
    "model_h5_empty": (bytes_of(lambda _: b"", ".h5"), "model.h5"),
    "model_h5_truncated": (bytes_of(lambda data: data[: len(data) // 2], ".h5"), "model.h5|truncated"),
    "model_h5_texts_damaged": (bytes_of(lambda data: data.replace(b"GCOL", b"lost"), ".h5"), "model.h5"),
    "model_h5_weights_alone": (weights_alone, "a.weights.h5|a.weights.json"),
    "model_other_ending": (written("model.pt", b"\x08\x07", load_model), "model.pt|.keras|.h5|.hdf5"),
    "model_huge_array": (weights_of(claim_huge_array), "model.h5|model.json|256 MiB"),
    "model_link": (weights_of(point_elsewhere), "model.h5|weights/00000"),
    "model_raw_file": (weights_of(read_raw_file), "model.h5|weights/00000"),
    "model_half_of_a_pair": (half_of_a_pair, "model.h5|model.json"),
    "model_of_two_pairs": (of_two_pairs, "model.h5|model.json|shape"),
    "model_pair_with_bad_layers": (json_of('{"class_name": '), "model.h5|model.json"),
    "model_pair_nested": (json_of(NESTED), "model.h5|model.json|recursion"),
    "model_int8_without_scales": (of_scales(None), "model.h5|weights/00002|scales"),
    "model_int8_of_other_scales": (of_scales(np.ones((1, 4), np.float32)), "model.h5|weights/00002|scales"),
    "model_int8_of_endless_scales": (of_scales(np.array([[1, np.inf, 1]], np.float32)), "model.h5|weights/00002"),
    "model_other_size": (
        fitting(lambda: build_model(image_size=(16, 16))),
        "model.keras|(16, 16, 3)|image_target_size|(8, 8, 3)",
    ),
    "model_two_inputs": (fitting(two_inputs), "model.keras|input"),
    "model_maps": (fitting(maps_of_classes), "model.keras|(8, 8, 3)"),
    "model_one_size_of_batch": (fitting(one_size_of_batch), "model.keras|(4, 8, 8, 3)|(8, 8, 3)"),
    "model_other_classes": (fitting(build_model, ["cat", "dog"]), "model.keras|3|2|cat, dog"),
    "model_missing": (lambda folder: resolve_model_path(str(folder / "best_model.keras")), "best_model.keras|.h5"),
    "exported_to_a_keras_script": (written("model.onnx", b"\x08\x07", load_model), "model.onnx|predict.py|.keras"),
    "exported_unknown_ending": (exported("model.pb", b"graph"), "model.pb|.tflite|.onnx|saved_model.pb"),
    "exported_tflite_empty": (exported("model.tflite", b""), "model.tflite"),
    "exported_tflite_text": (exported("model.tflite", HTML), "model.tflite"),
    "exported_onnx_empty": (exported("model.onnx", b""), "model.onnx"),
    "exported_onnx_text": (exported("model.onnx", HTML), "model.onnx"),
    "exported_graph_text": (exported("model/saved_model.pb", HTML), "model|SavedModel"),
    "exported_graph_that_writes": (graph_that_writes, "model|WriteFile"),
    "metadata_list": (metadata_of([1, 2]), "model_metadata.json|options|list"),
    "metadata_without_options": (metadata_of({"decision": {}}), "model_metadata.json|options"),
    "metadata_unknown_option": (metadata_of({"options": {"clases": ["cat"]}}), "model_metadata.json|clases|classes"),
    "configs_missing": (flags("--configs", "nowhere.json"), "nowhere.json"),
    "configs_empty": (configs_of(b""), "configs.json|JSON"),
    "configs_cut_short": (configs_of(b'{"batch_size": 16, "classes": ["cat", '), "configs.json|JSON"),
    "configs_list": (configs_of(b"[1, 2]"), "configs.json|list"),
    "configs_nested": (configs_of(b'{"classes": ' + b"[" * 10**5), "configs.json|JSON"),
    "configs_nested_less": (configs_of(b'{"classes": ' + b"[" * 400 + b"]" * 400 + b"}"), "configs.json|classes"),
    "configs_large": (configs_of(b" " * (2**24 + 1)), "configs.json|16777216"),
    "configs_not_utf_8": (configs_of(b'{"classes": ["\xc4rmel", "dog"]}'), "configs.json|utf-8"),
    "configs_utf_16": (configs_of('{"batch_size": 16}'.encode("utf-16")), "configs.json|utf-8"),
    "configs_wrong_type": (configs_of(b'{"batch_size": "16"}'), "configs.json|batch_size|'16'"),
    "configs_true_for_a_number": (configs_of(b'{"num_epochs": true}'), "configs.json|num_epochs|True"),
    "configs_unknown_key": (configs_of(b'{"bach_size": 16}'), "configs.json|bach_size|batch_size"),
    "configs_unknown_long_key": (configs_of(b'{"' + b"b" * 10**5 + b'": 16}'), "configs.json|'bb"),
    "configs_repeated_key": (configs_of(b'{"batch_size": 16, "batch_size": 32}'), "configs.json|batch_size"),
    "configs_huge_whole_number": (configs_of(b'{"num_epochs": ' + HUGE + b"}"), "configs.json|num_epochs|10"),
    "configs_huge_number": (configs_of(b'{"learning_rate": ' + HUGE + b"}"), "configs.json|learning_rate|10"),
    "configs_digits_without_end": (configs_of(b'{"num_epochs": ' + b"1" * 10**5 + b"}"), "configs.json|4300"),
    "configs_infinite": (configs_of(b'{"learning_rate": 1e999}'), "configs.json|learning_rate|inf"),
    "configs_nan": (configs_of(b'{"learning_rate": NaN}'), "configs.json|learning_rate|nan"),
    "configs_nul": (configs_of(b'{"train_csv": "a\\u0000b.csv"}'), "configs.json|train_csv|NUL"),
    "configs_surrogate": (configs_of(b'{"classes": ["cat", "\\ud800"]}'), "configs.json|classes|surrogate"),
    "flag_unknown": (flags("--learning_rte", "0.1"), "--learning_rte|--learning_rate"),
    "flag_without_value": (flags("--batch_size"), "--batch_size"),
    "flag_wrong_type": (flags("--batch_size", "16.0"), "batch_size|'16.0'"),
    "flag_nul": (flags("--save_model_path", "a\0b"), "save_model_path|NUL"),
    "flag_not_utf_8": (flags("--train_csv", "\udcff.csv"), "train_csv|surrogate"),
    "decision_empty": (decision_of(b" "), "decision.json|JSON"),
    "decision_list": (decision_of(b"[]"), "decision.json|[]"),
    "decision_nested": (decision_of(b"[" * 10**5), "decision.json|JSON"),
    "decision_unknown_field": (decision_of(sigma=1), "decision.json|sigma"),
    "decision_wrong_type": (decision_of(multi_label="no"), "decision.json|multi_label|'no'"),
    "decision_huge_number": (decision_of(temperature=10**400), "decision.json|temperature|10"),
    "decision_nan": (decision_of(exact_match_threshold=float("nan")), "decision.json|exact_match_threshold|nan"),
    "decision_other_classes": (decision_of(classes=["fox", "hen"]), "decision.json|cat, dog, owl|fox, hen"),
    "decision_path": (decision_of(model="../../best_model.keras"), "decision.json|model|../../best_model.keras"),
    "log_empty": (log_of(b""), "training_log.csv"),
    "log_of_another_kind": (log_of(b"a,b\n1,2\n"), "training_log.csv|epoch|loss|a, b"),
    "log_of_words": (log_of(b"epoch,loss\n1,low\n"), "training_log.csv|epoch|loss"),
    "log_not_utf_8": (log_of(b"\xff\xfe\x00"), "training_log.csv|utf-8"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line_with_its_names(case, tmp_path):
    run, names = CASES[case]
    with pytest.raises(UserError) as raised:
        run(tmp_path)
    check_message(str(raised.value), names, tmp_path)


# No code from a file


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_marshalled_code_is_not_run(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, suffix, build_model(keras.layers.Lambda(lambda x: (open("mark", "w").close(), x)[1])))
    os.remove("mark")
    with pytest.raises(UserError, match="Lambda"):
        load_model(path)
    assert not os.path.exists("mark")
    if suffix in (".keras", ".h5"):
        # Keras runs the code if it is told to trust the file.
        keras.models.load_model(path, safe_mode=False)
        assert os.path.exists("mark")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_no_module_that_a_file_names_is_imported(suffix, with_optimizer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "mark"
    (tmp_path / "foreign_layers.py").write_text(f"open({str(mark)!r}, 'w').close()\nDense = None\n")
    path = save(tmp_path, suffix)
    last_layer(module="foreign_layers", registered_name="foreign_layers>Dense")(path)
    with pytest.raises(UserError, match=r"foreign_layers\.Dense"):
        load_model(path, with_optimizer)
    assert not mark.exists()
    assert "foreign_layers" not in sys.modules


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_function_of_another_module_becomes_an_activation(suffix, tmp_path):
    path = save(tmp_path, suffix)
    last_options(activation=function_of("os", "system"))(path)
    with pytest.raises(UserError, match=r"os\.system"):
        load_model(path)


def test_code_in_the_training_part_of_an_hdf5_file_is_refused(tmp_path):
    model = build_model()
    model.compile("sgd", "mse")
    path = save(tmp_path, ".h5", model)
    with h5py.File(path, "r+") as file:
        training = json.loads(file.attrs["training_config"])
        training["loss"] = {"class_name": "__lambda__", "config": {"value": "AAAA"}}
        file.attrs["training_config"] = json.dumps(training)
    with pytest.raises(UserError, match="lambda"):
        load_model(path, with_optimizer=True)


@pytest.mark.parametrize("url", ["reference://a.jpg::memory://references.json", "memory://x::reference://a.jpg"])
def test_no_url_brings_a_program(url, tmp_path, store):
    # The references of fsspec may have templates, which some of its versions run.
    program = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(tmp_path / 'mark')!r}) }}}}"
    references = {"version": 1, "templates": {"u": program}, "gen": [], "refs": {"a.jpg": ["{{u}}"]}}
    store.put("memory://references.json", json.dumps(references).encode())
    assert inspect_image(url).fault[0] == "unreachable"
    with pytest.raises(UserError, match="'::'"):
        read_image(url)
    assert os.listdir(tmp_path) == []


def test_a_part_outside_of_an_archive_is_not_written(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="outside"):
        CASES["model_part_outside"][0](folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "model.keras"]


def test_the_count_of_weights_leaves_keras_as_it_was(tmp_path):
    before = keras.Layer.add_weight
    with pytest.raises(UserError, match="256 MiB"):
        CASES["model_huge_layer"][0](tmp_path)
    load_model(save(tmp_path, ".h5"))
    assert keras.Layer.add_weight is before


def test_compressing_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "best_model.keras").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"best_model\.keras"):
        compress_weights.main(compress_weights.CompressConfigs(model_path=str(tmp_path)))
    assert os.listdir(tmp_path) == ["best_model.keras"]


@pytest.mark.parametrize("model", [None, "lambda", "other size"])
@pytest.mark.parametrize("script", [train, evaluation, draw_activations, predict], ids=lambda script: script.__name__)
def test_every_script_refuses_a_foreign_model_in_one_line(script, model, photo_folder, small_run, tmp_path):
    table = "path,class\n" + "".join(f"{path},{path.parent.name}\n" for path in sorted(photo_folder.rglob("*.jpg")))
    (tmp_path / "photos.csv").write_text(table)
    folder = tmp_path / "foreign"
    folder.mkdir()
    if model is None:
        (folder / "best_model.keras").write_bytes(b"PK\x03\x04 half a file")
    else:
        (with_lambda() if model == "lambda" else build_model()).save(folder / "best_model.keras")
    # These options are given because no file describes the model.
    known = {"resize_mode": "stretch", "multi_label_classification": False}
    configs = small_run(tmp_path / "photos.csv", tmp_path / "photos.csv", load_model_path=str(folder)).replace(**known)
    if script is predict:
        options = {name: getattr(configs, name) for name in configs.given}
        paths = {"input": str(photo_folder), "write_path": str(tmp_path / "out.csv")}
        configs = predict.PredictConfigs(**options, **paths).replace(**known)
    with pytest.raises(UserError, match=r"best_model\.keras") as raised:
        script.main(configs.replace(allow_duplicates=True))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.csv").exists()
    assert os.listdir(folder) == ["best_model.keras"]


# The options


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "configs.json").write_bytes(b'\xef\xbb\xbf{"batch_size": 7}')
    assert Configs.from_json(str(tmp_path / "configs.json")).batch_size == 7


def test_many_unknown_options_end_soon_in_a_short_message(tmp_path):
    (tmp_path / "configs.json").write_text(json.dumps({f"option_{number}": 1 for number in range(10**5)}))
    with pytest.raises(UserError) as raised:
        Configs.from_json(str(tmp_path / "configs.json"))
    assert len(str(raised.value).splitlines()) == 21


def test_the_largest_whole_number_passes():
    assert Configs(num_epochs=2**53).validate().num_epochs == 9007199254740992
    with pytest.raises(UserError, match="num_epochs"):
        Configs(num_epochs=2**53 + 1).validate()


# File names


BAD_NAMES = [
    "a/../../b.jpg",
    "..\\..\\c.jpg",
    "a/C:\\d.jpg",
    "a/line\nbreak\x1b[31m\x00.jpg",
    "a/.hidden.jpg",
    "a/..jpg",
]
BAD_NAMES += ["a/.jpg", "CON.jpg", "a/nul.tar.png", "lpt1.gif", 'a/<b>|?*".jpg', "a/\u202egpj.exe.jpg", "Same.jpg"]
BAD_NAMES += ["x" * 300 + ".jpg", "x" * 299 + "y.jpg", "花" * 100 + ".jpg", "same.jpg", "a/b:c.tif"]


def test_names_of_pictures_are_valid_on_every_system_and_stay_in_their_folder(tmp_path):
    (tmp_path / "cam_output").mkdir()
    names = name_outputs([f"root/{name}" for name in BAD_NAMES])
    assert len({name.casefold() for name in names}) == len(BAD_NAMES)
    for name in names:
        assert name.isprintable()
        assert not set(name) & set('<>:"/\\|?*')
        assert not name.startswith(".")
        assert name.split(".")[0].upper() not in ("CON", "NUL", "LPT1")
        # The folder of the temporary file has the name with a prefix.
        assert len(f"{TEMPORARY_PREFIX}{2**22}-{name}_999".encode()) <= 255
        cam_pictures.write_image(str(tmp_path / "cam_output" / name), np.zeros((4, 4, 3), np.uint8))
    assert os.listdir(tmp_path) == ["cam_output"]
    assert sorted(os.listdir(tmp_path / "cam_output")) == sorted(names)


def test_ordinary_names_stay_as_they_are():
    paths = ["root/cat/1.jpg", "root/dog/Häuser am See (2).JPG", "root/dog/花.webp", "root/dog/scan.tif"]
    assert name_outputs(paths) == ["cat-1.jpg", "dog-Häuser am See (2).JPG", "dog-花.webp", "dog-scan.tif.png"]


# The source


FORBIDDEN_NAMES = {"eval", "exec", "__import__", "compile"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "subprocess", "importlib", "runpy", "code"}
FORBIDDEN_CALLS = {"os.system", "os.popen", "pd.read_pickle", "np.load", "pd.eval"}
# The first one asks nvidia-smi, and finds and loads TensorFlow. The second one runs itself: HDF5 may crash.
RUN_PROGRAMS = {"devices.py": {"subprocess", "importlib"}, "hdf5_attributes.py": {"subprocess"}}


def test_no_module_runs_text_or_unpickles_objects():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("finetune/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in FORBIDDEN_NAMES | FORBIDDEN_CALLS, where
                assert not [option for option in node.keywords if option.arg in ("shell", "allow_pickle")], where
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                forbidden = FORBIDDEN_MODULES - RUN_PROGRAMS.get(path.name, set())
                assert not {module.split(".")[0] for module in modules} & forbidden, where
                assert not {"system", "popen"} & {alias.name for alias in node.names}, where
