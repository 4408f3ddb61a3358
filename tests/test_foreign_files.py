"""Files from elsewhere end in one line, as docs/bad_input.md has it, run no code and write nothing elsewhere."""

import ast
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from corpus import BAD_TABLES, build_corpus, encode, images, photo
from fsspec import AbstractFileSystem, register_implementation
from fsspec.implementations.memory import MemoryFileSystem

import draw_activations
import make_csv_from_folders
import predict
import test as evaluation
import train
from compress_weights import CompressConfigs
from configs import Configs
from finetune.core.files import TEMPORARY_PREFIX
from finetune.core.options import UserError
from finetune.data.data_check import check_data, inspect_named
from finetune.data.findings import KINDS
from finetune.data.images import read_image
from finetune.data.inspection import inspect_image
from finetune.data.tables import make_image_table, parse_table, resolve_class_names
from finetune.evaluation.decision import Decision
from finetune.evaluation.decision_file import read_decision, write_decision
from finetune.models.compressed import custom_save_model
from finetune.models.description import describe_model
from finetune.models.model_files import load_fitting_model, load_model
from finetune.predicting.runtimes import load_exported_model
from finetune.reporting import cam_pictures
from finetune.reporting.cam_pictures import name_outputs
from finetune.reporting.log_figures import read_log
from finetune.training.trained_model import resolve_model_path

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["cat", "dog", "owl"]
SUFFIXES = (".keras", ".h5", ".hdf5", "compressed")


def build_model(*middle, image_size=(8, 8)):
    layers = [keras.Input((*image_size, 3)), keras.layers.Conv2D(2, 3), *middle, keras.layers.Flatten()]
    return keras.Sequential([*layers, keras.layers.Dense(3, activation="softmax")])


def save(folder, suffix, model=None):
    """Saves a model in one of the formats; returns the path that leads to it."""
    model = model or build_model()
    if suffix == "compressed":
        return custom_save_model(model, str(folder), "model")[0]
    path = folder / f"model{suffix}"
    model.save(path)
    return str(path)


def change_archive(path, change, packing=zipfile.ZIP_STORED):
    """Rewrites the parts of an archive; `change` takes and returns them by name."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in change(parts).items():
            archive.writestr(name, content)


def change_layers(path, change):
    """Rewrites the description of the layers in a model file; `change` takes and returns what JSON holds."""
    layers_path = Path(path).with_suffix(".json")
    if path.endswith(".keras"):
        change_archive(path, lambda p: p | {"config.json": json.dumps(change(json.loads(p["config.json"])))})
    elif layers_path.exists():
        layers_path.write_text(json.dumps(change(json.loads(layers_path.read_text()))))
    else:
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = json.dumps(change(json.loads(file.attrs["model_config"])))


def with_last_layer(**changes):
    """Returns a change of layers that sets something in the last one."""

    def change(layers):
        layers["config"]["layers"][-1] |= changes
        return layers

    return change


def with_options(**options):
    """Returns a change of layers that sets options of the last one."""

    def change(layers):
        layers["config"]["layers"][-1]["config"] |= options
        return layers

    return change


def loading(suffix, change=None, content=None, **options):
    """Returns a case: a model file is saved, changed and loaded."""

    def run(folder):
        path = save(folder, suffix, **options)
        if content is not None:
            Path(path).write_bytes(content(Path(path).read_bytes()))
        if change is not None:
            change(path)
        load_model(path)

    return run


def fitting(model, **options):
    """Returns a case: a model is loaded to tell three classes apart in images of 8x8."""

    def run(folder):
        load_fitting_model(save(folder, ".keras", model()), CLASSES, (8, 8), **options)

    return run


def with_archive(change, **options):
    return lambda path: change_archive(path, change, **options)


def with_layers(change):
    return lambda path: change_layers(path, change)


def flip_weights(content):
    position = content.index(b"\x89HDF") + 3000
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def claim_huge_array(path):
    with h5py.File(path, "r+") as file:
        name = sorted(file["weights"])[0]
        del file["weights"][name]
        file["weights"].create_dataset(name, (10**6, 10**6), "f4", chunks=(1000, 1000), compression="gzip")


def point_elsewhere(path):
    with h5py.File(path, "r+") as file:
        name = sorted(file["weights"])[0]
        del file["weights"][name]
        file["weights"][name] = h5py.ExternalLink("/etc/other.h5", "weights")


def read_raw_file(path):
    with h5py.File(path, "r+") as file:
        name = sorted(file["weights"])[0]
        shape = file["weights"][name].shape
        del file["weights"][name]
        file["weights"].create_dataset(name, shape, "u1", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def two_inputs():
    inputs = [keras.Input((8, 8, 3)), keras.Input((8, 8, 3))]
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(keras.layers.Add()(inputs))))


def one_size_of_batch():
    layers = [keras.Input((8, 8, 3), batch_size=4), keras.layers.Flatten(), keras.layers.Dense(3)]
    return keras.Sequential(layers)


def maps_of_classes():
    return keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(3, 1)])


def a_layer_alone(folder):
    path = folder / "model.keras"
    save(folder, ".keras")
    dense = keras.saving.serialize_keras_object(keras.layers.Dense(3))
    change_archive(path, lambda parts: parts | {"config.json": json.dumps(dense)})
    load_model(str(path))


def half_of_a_pair(folder):
    path = save(folder, "compressed")
    os.remove(Path(path).with_suffix(".json"))
    load_model(path)


def of_two_pairs(folder):
    path = save(folder, "compressed", build_model(keras.layers.Conv2D(4, 3)))
    layers = Path(path).with_suffix(".json").read_text()
    save(folder, "compressed")
    Path(path).with_suffix(".json").write_text(layers)
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


def exported(name, content):
    """Returns a case: a file in the place of an exported model is loaded."""

    def run(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        load_exported_model(str(folder / name.split("/")[0]))

    return run


def graph_that_writes(folder):
    """A case: a SavedModel that writes a file."""

    def serve(image):
        tf.io.write_file(str(folder / "mark"), "hello")
        return image[:, 0, 0]

    module = tf.Module()
    module.serve = tf.function(serve, input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.float32, "image")])
    tf.saved_model.save(module, str(folder / "model"), signatures=module.serve)
    load_exported_model(str(folder / "model"))


def metadata_of(content):
    """Returns a case: what stands beside an exported model says what it is."""

    def run(folder):
        (folder / "model_metadata.json").write_text(json.dumps(content))
        describe_model(Configs(), str(folder / "model.onnx"))

    return run


def configs_of(content):
    """Returns a case: a configs file is read."""

    def run(folder):
        (folder / "configs.json").write_bytes(content)
        Configs.from_command_line(arguments=["--configs", str(folder / "configs.json")])

    return run


def flags(*words):
    return lambda folder: Configs.from_command_line(arguments=words)


def decision_of(content=None, **fields):
    """Returns a case: a decision file is read, `write_decision`'s own where only `fields` are given."""

    def run(folder):
        path = Path(write_decision(str(folder), Decision(CLASSES, False)))
        path.write_bytes(content or json.dumps(json.loads(path.read_text()) | fields).encode())
        read_decision(str(folder), CLASSES, False, "best_model.keras")

    return run


def log_of(content):
    def run(folder):
        (folder / "training_log.csv").write_bytes(content)
        read_log(str(folder / "training_log.csv"))

    return run


def image_of(name):
    """Returns a case: the data check decodes an image of the corpus; it returns what is found."""

    def run(folder):
        found = inspect_image(str(build_corpus(folder)[name]), decode=True)
        return tell_findings([found.fault] if found.fault else found.remarks)

    return run


def url_of(url, content=None, read=False):
    """Returns a case: the data check decodes what a URL names, or the generator reads it.

    `content` is that of `memory://bucket/photo.jpg`, which is otherwise a whole image.
    """

    def run(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryFileSystem, "store", {})
            patch.setitem(sys.modules, "s3fs", None)
            MemoryFileSystem().pipe_file("/bucket/photo.jpg", encode("JPEG") if content is None else content)
            if read:
                return read_image(url)
            found = inspect_image(url, decode=True)
        return tell_findings([found.fault] if found.fault else found.remarks)

    return run


class Forbidding(AbstractFileSystem):
    """A store that knows who asks, and gives them nothing."""

    protocol = "forbidding"

    def info(self, path, **options):
        raise PermissionError("Access Denied")

    def cat_file(self, path, start=None, end=None, **options):
        raise PermissionError("Access Denied")


register_implementation("forbidding", Forbidding, clobber=True)


def table_of(name):
    """Returns a case: the data check reads a table of the corpus, whose images are all there, and tells of it."""

    def run(folder):
        path, multi_label = folder / "table.csv", name.startswith("multi_label")
        path.write_bytes(BAD_TABLES[name])
        content = parse_table(str(path), "class")
        for number, image in enumerate(content["path"].unique()):
            write_image(folder / image.replace("\0", "0"), number)
        table = make_image_table("training", str(path), content, "class", str(folder))
        found = check_data([table], Configs(image_target_size=(1, 1, 3)), multi_label).findings
        # Small tables have such classes all of them.
        found = [finding for finding in found if finding.kind != "class_of_one_image" or finding.kind == name]
        if not found:
            resolve_class_names(None, str(path), "class", multi_label)
        return tell_findings([(finding.kind, f"row {finding.row}: {finding.detail}") for finding in found])

    return run


def path_of(text, *names):
    """Returns a case: the data check looks for the file that a table names; the folder holds others."""

    def run(folder):
        for number, name in enumerate(names):
            write_image(folder / name, number)
        fault = inspect_named([f"{folder}/{text}"], False, 10**6, 1)[0].fault
        return tell_findings([(fault[0], fault[1].replace(f"{folder}{os.sep}", ""))])

    return run


def folders_of(*names, **options):
    """Returns a case: make_csv_from_folders.py lists a folder of these images, or of folders where a name ends so."""

    def run(folder):
        for number, name in enumerate(names):
            if name.endswith("/"):
                (folder / "photos" / name).mkdir(parents=True)
            else:
                write_image(folder / "photos" / name, number)
        values = {"folder_path": str(folder / "photos"), "write_path": str(folder / "all.csv")} | options
        make_csv_from_folders.main(make_csv_from_folders.FolderConfigs(**values).validate())

    return run


def labels_of(content, *names, **options):
    """Returns a case: make_csv_from_folders.py makes a table of images from a table of labels."""

    def run(folder):
        (folder / "labels.csv").write_bytes(content)
        folders_of(*(names or ("1.jpg", "2.jpg")), table_path=str(folder / "labels.csv"), **options)(folder)

    return run


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(encode("JPEG", photo(seed)))


def tell_findings(found):
    lines = [f"{kind} ({KINDS[kind].severity}): {detail}" for kind, detail in found]
    return "; ".join(lines) or "nothing, it is right"


HUGE = b"1" + b"0" * 400
CASES = {
    "model_empty": loading(".keras", content=lambda _: b""),
    "model_text": loading(".keras", content=lambda _: b"<!DOCTYPE html><html>404 Not Found</html>"),
    "model_truncated": loading(".keras", content=lambda content: content[: len(content) // 2]),
    "model_damaged": loading(".keras", content=flip_weights),
    "model_foreign_archive": loading(".keras", with_archive(lambda _: {"notes.txt": "x"})),
    "model_without_weights": loading(".keras", with_archive(lambda p: {"config.json": p["config.json"]})),
    "model_bomb": loading(
        ".keras", with_archive(lambda p: p | {"model.weights.h5": bytes(2**29)}, packing=zipfile.ZIP_DEFLATED)
    ),
    "model_packed_otherwise": loading(".keras", with_archive(lambda p: p, packing=zipfile.ZIP_BZIP2)),
    "model_part_outside": loading(".keras", with_archive(lambda p: p | {"../../outside.txt": "x"})),
    "model_lambda": loading(".keras", model=build_model(keras.layers.Lambda(lambda x: x * 2))),
    "model_lambda_h5": loading(".h5", model=build_model(keras.layers.Lambda(lambda x: x * 2))),
    "model_lambda_compressed": loading("compressed", model=build_model(keras.layers.Lambda(lambda x: x * 2))),
    "model_saved_model_layer": loading(".keras", with_layers(with_last_layer(class_name="TFSMLayer"))),
    "model_other_package": loading(".keras", with_layers(with_last_layer(module="torch.nn", class_name="Linear"))),
    "model_unknown_layer": loading(".keras", with_layers(with_last_layer(class_name="Densest"))),
    "model_unknown_registered": loading(
        ".keras", with_layers(with_last_layer(module=None, registered_name="mine>Dense"))
    ),
    "model_file_loader": loading(
        ".keras",
        with_layers(with_options(activation={"class_name": "function", "module": "keras.utils", "config": "get_file"})),
    ),
    "model_shell": loading(
        ".keras",
        with_layers(with_options(activation={"class_name": "function", "module": "os", "config": "system"})),
    ),
    "model_huge_layer": loading(".keras", with_layers(with_options(units=10**12))),
    "model_huge_number": loading(".keras", with_layers(with_options(units=10**400))),
    "model_negative_number": loading(".keras", with_layers(with_options(units=-3))),
    "model_layers_as_text": loading(".keras", with_layers(lambda _: "Sequential")),
    "model_a_layer_alone": a_layer_alone,
    "model_h5_empty": loading(".h5", content=lambda _: b""),
    "model_h5_truncated": loading(".h5", content=lambda content: content[: len(content) // 2]),
    "model_h5_texts_damaged": loading(".h5", content=lambda content: content.replace(b"GCOL", b"lost")),
    "model_h5_weights_alone": lambda folder: (
        build_model().save_weights(folder / "a.weights.h5"),
        load_model(str(folder / "a.weights.h5")),
    ),
    "model_other_ending": lambda folder: (
        (folder / "model.pt").write_bytes(b"\x08\x07"),
        load_model(str(folder / "model.pt")),
    ),
    "model_huge_array": loading("compressed", claim_huge_array),
    "model_link": loading("compressed", point_elsewhere),
    "model_raw_file": loading("compressed", read_raw_file),
    "model_half_of_a_pair": half_of_a_pair,
    "model_of_two_pairs": of_two_pairs,
    "model_pair_with_bad_layers": loading(
        "compressed", lambda path: Path(path).with_suffix(".json").write_text('{"class_name": ')
    ),
    "model_pair_nested": loading(
        "compressed", lambda path: Path(path).with_suffix(".json").write_text("[" * 10**5 + "]" * 10**5)
    ),
    "model_int8_without_scales": of_scales(None),
    "model_int8_of_other_scales": of_scales(np.ones((1, 4), np.float32)),
    "model_int8_of_endless_scales": of_scales(np.array([[1, np.inf, 1]], np.float32)),
    "model_other_size": fitting(lambda: build_model(image_size=(16, 16))),
    "model_two_inputs": fitting(two_inputs),
    "model_maps": fitting(maps_of_classes),
    "model_one_size_of_batch": fitting(one_size_of_batch),
    "model_other_classes": lambda folder: load_fitting_model(save(folder, ".keras"), ["cat", "dog"], (8, 8)),
    "exported_to_a_keras_script": lambda folder: (
        (folder / "model.onnx").write_bytes(b"\x08\x07"),
        load_model(str(folder / "model.onnx")),
    ),
    "exported_unknown_ending": exported("model.pb", b"graph"),
    "exported_tflite_empty": exported("model.tflite", b""),
    "exported_tflite_text": exported("model.tflite", b"<html>not found</html>"),
    "exported_onnx_empty": exported("model.onnx", b""),
    "exported_onnx_text": exported("model.onnx", b"<html>not found</html>"),
    "exported_graph_text": exported("model/saved_model.pb", b"<html>not found</html>"),
    "exported_graph_that_writes": graph_that_writes,
    "metadata_list": metadata_of([1, 2]),
    "metadata_without_options": metadata_of({"decision": {}}),
    "metadata_unknown_option": metadata_of({"options": {"clases": ["cat"]}}),
    "model_missing": lambda folder: resolve_model_path(str(folder / "best_model.keras")),
    "configs_missing": flags("--configs", "nowhere.json"),
    "configs_empty": configs_of(b""),
    "configs_cut_short": configs_of(b'{"batch_size": 16, "classes": ["cat", '),
    "configs_list": configs_of(b"[1, 2]"),
    "configs_nested": configs_of(b'{"classes": ' + b"[" * 10**5),
    "configs_nested_less": configs_of(b'{"classes": ' + b"[" * 400 + b"]" * 400 + b"}"),
    "configs_large": configs_of(b" " * (2**24 + 1)),
    "configs_not_utf_8": configs_of(b'{"classes": ["\xc4rmel", "dog"]}'),
    "configs_utf_16": configs_of('{"batch_size": 16}'.encode("utf-16")),
    "configs_wrong_type": configs_of(b'{"batch_size": "16"}'),
    "configs_true_for_a_number": configs_of(b'{"num_epochs": true}'),
    "configs_unknown_key": configs_of(b'{"bach_size": 16}'),
    "configs_unknown_long_key": configs_of(b'{"' + b"b" * 10**5 + b'": 16}'),
    "configs_repeated_key": configs_of(b'{"batch_size": 16, "batch_size": 32}'),
    "configs_huge_whole_number": configs_of(b'{"num_epochs": ' + HUGE + b"}"),
    "configs_huge_number": configs_of(b'{"learning_rate": ' + HUGE + b"}"),
    "configs_digits_without_end": configs_of(b'{"num_epochs": ' + b"1" * 10**5 + b"}"),
    "configs_infinite": configs_of(b'{"learning_rate": 1e999}'),
    "configs_nan": configs_of(b'{"learning_rate": NaN}'),
    "configs_nul": configs_of(b'{"train_csv": "a\\u0000b.csv"}'),
    "configs_surrogate": configs_of(b'{"classes": ["cat", "\\ud800"]}'),
    "flag_unknown": flags("--learning_rte", "0.1"),
    "flag_without_value": flags("--batch_size"),
    "flag_wrong_type": flags("--batch_size", "16.0"),
    "flag_nul": flags("--save_model_path", "a\0b"),
    "flag_not_utf_8": flags("--train_csv", "\udcff.csv"),
    "decision_empty": decision_of(b" "),
    "decision_list": decision_of(b"[]"),
    "decision_nested": decision_of(b"[" * 10**5),
    "decision_unknown_field": decision_of(sigma=1),
    "decision_wrong_type": decision_of(multi_label="no"),
    "decision_huge_number": decision_of(temperature=10**400),
    "decision_nan": decision_of(exact_match_threshold=float("nan")),
    "decision_other_classes": decision_of(classes=["fox", "hen"]),
    "decision_path": decision_of(model="../../best_model.keras"),
    "log_empty": log_of(b""),
    "log_of_another_kind": log_of(b"a,b\n1,2\n"),
    "log_of_words": log_of(b"epoch,loss\n1,low\n"),
    "log_not_utf_8": log_of(b"\xff\xfe\x00"),
    **{f"image_{name}": image_of(name) for name in [*images(), "folder"]},
    "url_good": url_of("memory://bucket/photo.jpg"),
    "url_missing": url_of("memory://bucket/none.jpg"),
    "url_missing_read": url_of("memory://bucket/none.jpg", read=True),
    "url_folder": url_of("memory://bucket"),
    "url_empty": url_of("memory://bucket/photo.jpg", b""),
    "url_truncated": url_of("memory://bucket/photo.jpg", encode("JPEG")[:-300]),
    "url_device": url_of("file:///dev/zero"),
    "url_unknown_protocol": url_of("htps://host/photo.jpg"),
    "url_unknown_protocol_read": url_of("htps://host/photo.jpg", read=True),
    "url_without_package": url_of("s3://bucket/photo.jpg"),
    "url_forbidden": url_of("forbidding://bucket/photo.jpg"),
    "url_forbidden_read": url_of("forbidding://bucket/photo.jpg", read=True),
    "url_no_answer": url_of("ftp://localhost:1/photo.jpg"),
    "url_joined": url_of("reference://photo.jpg::memory://bucket/references.json"),
    **{f"table_{name}": table_of(name) for name in BAD_TABLES if name != "path_outside"},
    "path_without_ending": path_of("photos/1", "photos/1.jpg"),
    "path_without_ending_of_two_files": path_of("photos/1", "photos/1.jpg", "photos/1.png"),
    "path_of_backslashes": path_of("photos\\cat\\1.jpg", "photos/cat/1.jpg"),
    "path_of_backslashes_without_ending": path_of("photos\\cat\\1", "photos/cat/1.jpg"),
    "path_with_blanks": path_of("photos/1.jpg ", "photos/1.jpg"),
    "path_in_quotes": path_of("'1.jpg'", "1.jpg"),
    "path_of_other_capitals": path_of("photos/img_1.jpg", "photos/IMG_1.JPG"),
    "path_of_a_drive": path_of("photos/C:\\me\\cat\\1.jpg", "photos/cat/1.jpg"),
    "path_of_a_drive_without_such_a_file": path_of("photos/C:\\me\\cat\\2.jpg", "photos/cat/1.jpg"),
    "path_with_an_invisible_character": path_of("photos/1\u200b.jpg", "photos/1.jpg"),
    "path_of_mixed_accents": path_of("phote\u0301/\u00e9.jpg", "phot\u00e9/e\u0301.jpg"),
    "path_of_another_ending": path_of("photos/1.jpg", "photos/1.png"),
    "path_of_no_file": path_of("photos/3.jpg", "photos/1.jpg"),
    "folders_none": folders_of("1.jpg"),
    "folders_without_images": folders_of("cat/"),
    "folders_one_level_above": folders_of("photos/cat/1.jpg", "photos/dog/2.jpg"),
    "folders_with_separator": folders_of("cat$dog/1.jpg"),
    "folders_of_sets_and_others": folders_of("train/cat/1.jpg", "val/cat/2.jpg", "more/cat/3.jpg"),
    "folders_of_one_set_twice": folders_of("train/cat/1.jpg", "val/cat/2.jpg", "valid/cat/3.jpg"),
    "folders_of_a_set_without_labels": folders_of("train/cat/1.jpg", "test/2.jpg"),
    "folders_of_sets_without_training": folders_of("val/cat/1.jpg", "test/cat/2.jpg"),
    "folders_of_one_set": folders_of("train/cat/1.jpg", "train/dog/2.jpg"),
    "labels_empty": labels_of(b""),
    "labels_missing": folders_of("1.jpg", table_path="nowhere.csv"),
    "labels_header_alone": labels_of(b"id,class\n"),
    "labels_no_header": labels_of(b"1,cat\n2,dog\n"),
    "labels_no_header_of_paths": labels_of(b"1.jpg,cat\n2.jpg,dog\n"),
    "labels_latin_1": labels_of("id,class\n1,Ärmel\n".encode("latin-1")),
    "labels_workbook": labels_of(b"PK\x03\x04\x14\x00"),
    "labels_more_fields": labels_of(b"id,class\n1,cat,dog\n"),
    "labels_column_twice": labels_of(b"id,cat,cat\n1,0,1\n"),
    "labels_of_other_images": labels_of(b"id,class\n7,cat\n8,dog\n"),
    "labels_without_image": labels_of(b"id,class\n1,cat\n8,dog\n"),
    "labels_of_two_endings": labels_of(b"id,class\n1,cat\n", "a/1.jpg", "a/1.png"),
    "labels_of_two_folders": labels_of(b"id,class\n1,cat\n", "a/1.jpg", "b/1.jpg"),
    "labels_without_labels": labels_of(b"id\n1\n2\n"),
    "labels_of_no_class": labels_of(b"id,class\n1,\n"),
    "labels_of_many_columns": labels_of(b"id,breed,age\n1,pug,4\n"),
    "labels_of_a_column_that_lacks": labels_of(b"id,breed\n1,pug\n", csv_label_column="kind"),
    "labels_of_probabilities": labels_of(b"id,cat,dog\n1,0.3,0.7\n"),
    "labels_of_several_classes": labels_of(b"id,cat,dog\n1,1,0\n2,1,1\n"),
    "labels_with_separator": labels_of(b"id,a$b,c\n1,1,0\n"),
}


def tell(case, folder):
    """Returns the message that a case ends in, or what it found, its folder left out."""
    try:
        message = CASES[case](folder)
    except UserError as error:
        message = str(error).replace(f"{folder}{os.sep}", "")
    assert isinstance(message, str), "no error was raised"
    return message.replace("\t", " ")


def read_documented():
    """Returns the messages in docs/bad_input.md by the names of their cases."""
    rows = re.findall(r"^\| `(\w+)` \| .+? \| (.+) \|$", (ROOT / "docs/bad_input.md").read_text("utf-8"), re.MULTILINE)
    return {name: message.strip("`").strip().replace("\\|", "|") for name, message in rows}


@pytest.mark.parametrize("case", CASES)
def test_the_user_sees_the_line_that_is_documented(case, tmp_path):
    message = tell(case, tmp_path)
    # What differs between versions of a library is written as an ellipsis.
    assert re.fullmatch(".*".join(map(re.escape, read_documented()[case].split("…"))), message), message
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 700


def test_every_documented_input_is_tried():
    names = read_documented().keys()
    assert CASES.keys() == names


# No code from a file


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_marshalled_code_is_not_run(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, suffix, build_model(keras.layers.Lambda(lambda x: (open("mark", "w").close(), x)[1])))
    os.remove("mark")
    with pytest.raises(UserError, match="Lambda layer, program code"):
        load_model(path)
    assert not os.path.exists("mark")
    if suffix in (".keras", ".h5"):
        # The file does what it is made for where Keras is told to trust it.
        keras.models.load_model(path, safe_mode=False)
        assert os.path.exists("mark")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_no_module_that_a_file_names_is_imported(suffix, with_optimizer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "mark"
    (tmp_path / "foreign_layers.py").write_text(f"open({str(mark)!r}, 'w').close()\nDense = None\n")
    path = save(tmp_path, suffix)
    change_layers(path, with_last_layer(module="foreign_layers", registered_name="foreign_layers>Dense"))
    with pytest.raises(UserError, match=r"it needs foreign_layers\.Dense, code that is not Keras's own"):
        load_model(path, with_optimizer)
    assert not mark.exists()
    assert "foreign_layers" not in sys.modules


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_function_of_another_module_becomes_an_activation(suffix, tmp_path):
    path = save(tmp_path, suffix)
    function = {"class_name": "function", "module": "os", "config": "system", "registered_name": "system"}
    change_layers(path, with_options(activation=function))
    with pytest.raises(UserError, match=r"it needs os\.system"):
        load_model(path)


def test_code_in_the_training_part_of_an_hdf5_file_is_refused(tmp_path):
    model = build_model()
    model.compile("sgd", "mse")
    path = save(tmp_path, ".h5", model)
    with h5py.File(path, "r+") as file:
        training = json.loads(file.attrs["training_config"])
        training["loss"] = {"class_name": "__lambda__", "config": {"value": "AAAA"}}
        file.attrs["training_config"] = json.dumps(training)
    with pytest.raises(UserError, match="Python lambda"):
        load_model(path, with_optimizer=True)


@pytest.mark.parametrize("url", ["reference://a.jpg::memory://references.json", "memory://x::reference://a.jpg"])
def test_no_url_brings_a_program(url, tmp_path, store):
    # What fsspec calls references may hold templates, which some of its versions run.
    program = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(tmp_path / 'mark')!r}) }}}}"
    references = {"version": 1, "templates": {"u": program}, "gen": [], "refs": {"a.jpg": ["{{u}}"]}}
    store.put("memory://references.json", json.dumps(references).encode())
    assert inspect_image(url).fault[0] == "unreachable"
    with pytest.raises(UserError, match="joined by '::' are not read"):
        read_image(url)
    assert os.listdir(tmp_path) == []


def test_a_part_outside_of_an_archive_is_not_written(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="lies outside"):
        CASES["model_part_outside"](folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "model.keras"]


def test_the_count_of_weights_leaves_keras_as_it_was(tmp_path):
    before = keras.Layer.add_weight
    with pytest.raises(UserError, match="claims more weights"):
        CASES["model_huge_layer"](tmp_path)
    load_model(save(tmp_path, ".h5"))
    assert keras.Layer.add_weight is before


def test_compressing_what_is_no_model_ends_in_a_line(tmp_path):
    import compress_weights

    (tmp_path / "best_model.keras").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is not a model that Keras reads"):
        compress_weights.main(CompressConfigs(model_path=str(tmp_path)))
    assert os.listdir(tmp_path) == ["best_model.keras"]


@pytest.mark.parametrize("model", [None, "lambda", "other size"])
@pytest.mark.parametrize("script", [train, evaluation, draw_activations, predict], ids=lambda script: script.__name__)
def test_every_script_ends_in_a_line_on_a_foreign_model(script, model, photo_folder, small_run, tmp_path):
    table = "path,class\n" + "".join(f"{path},{path.parent.name}\n" for path in sorted(photo_folder.rglob("*.jpg")))
    (tmp_path / "photos.csv").write_text(table)
    folder = tmp_path / "foreign"
    folder.mkdir()
    if model is None:
        (folder / "best_model.keras").write_bytes(b"PK\x03\x04 half a file")
    else:
        layers = [keras.layers.Lambda(lambda x: x * 2)] if model == "lambda" else []
        build_model(*layers).save(folder / "best_model.keras")
    # What no file says of the model is given.
    known = {"resize_mode": "stretch", "multi_label_classification": False}
    configs = small_run(tmp_path / "photos.csv", tmp_path / "photos.csv", load_model_path=str(folder)).replace(**known)
    if script is predict:
        options = {name: getattr(configs, name) for name in configs.given}
        paths = {"input": str(photo_folder), "write_path": str(tmp_path / "out.csv")}
        configs = predict.PredictConfigs(**options, **paths).replace(**known)
    with pytest.raises(UserError, match=r"best_model\.keras (is not|takes)") as raised:
        script.main(configs.replace(allow_duplicates=True))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.csv").exists()
    assert os.listdir(folder) == ["best_model.keras"]


# The options


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "configs.json").write_bytes(b'\xef\xbb\xbf{"batch_size": 7}')
    assert Configs.from_json(str(tmp_path / "configs.json")).batch_size == 7


def test_many_unknown_options_are_told_at_once_and_soon(tmp_path):
    (tmp_path / "configs.json").write_text(json.dumps({f"option_{number}": 1 for number in range(10**5)}))
    with pytest.raises(UserError) as raised:
        Configs.from_json(str(tmp_path / "configs.json"))
    assert len(str(raised.value).splitlines()) == 21


def test_the_largest_whole_number_passes(tmp_path):
    configs = Configs(num_epochs=2**53).validate()
    assert configs.num_epochs == 9007199254740992
    with pytest.raises(UserError, match=r"num_epochs: expected a whole number"):
        configs.replace(num_epochs=2**53 + 1).validate()


# File names


BAD_NAMES = [
    "a/../../b.jpg",
    "..\\..\\c.jpg",
    "a/C:\\d.jpg",
    "a/line\nbreak\x1b[31m\x00.jpg",
    "a/.hidden.jpg",
    "a/..jpg",
    "a/.jpg",
    "CON.jpg",
    "a/nul.tar.png",
    "lpt1.gif",
    'a/<b>|?*".jpg',
    "a/\u202egpj.exe.jpg",
    "x" * 300 + ".jpg",
    "x" * 299 + "y.jpg",
    "花" * 100 + ".jpg",
    "Same.jpg",
    "same.jpg",
    "a/b:c.tif",
]


def test_names_of_pictures_stay_in_their_folder_on_every_system():
    names = name_outputs([f"root/{name}" for name in BAD_NAMES])
    assert len({name.casefold() for name in names}) == len(BAD_NAMES)
    for name in names:
        assert name.isprintable()
        assert not set(name) & set('<>:"/\\|?*')
        assert not name.startswith(".")
        assert name.split(".")[0].upper() not in ("CON", "NUL", "LPT1")
        # The folder of the temporary file bears the name with a prefix.
        assert len(f"{TEMPORARY_PREFIX}{2**22}-{name}_999".encode()) <= 255


def test_ordinary_names_stay_as_they_are():
    paths = ["root/cat/1.jpg", "root/dog/Häuser am See (2).JPG", "root/dog/花.webp", "root/dog/scan.tif"]
    expected = ["cat-1.jpg", "dog-Häuser am See (2).JPG", "dog-花.webp", "dog-scan.tif.png"]
    assert name_outputs(paths) == expected


def test_pictures_of_bad_names_are_written_into_their_folder_alone(tmp_path):
    (tmp_path / "cam_output").mkdir()
    names = name_outputs([f"root/{name}" for name in BAD_NAMES])
    for name in names:
        cam_pictures.write_image(str(tmp_path / "cam_output" / name), np.zeros((4, 4, 3), np.uint8))
    assert os.listdir(tmp_path) == ["cam_output"]
    assert sorted(os.listdir(tmp_path / "cam_output")) == sorted(names)


# The source


FORBIDDEN_NAMES = {"eval", "exec", "__import__", "compile"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "subprocess", "importlib", "runpy", "code"}
FORBIDDEN_CALLS = {"os.system", "os.popen", "pd.read_pickle", "np.load", "pd.eval"}


# Two of these read no file that others have made: they ask nvidia-smi, and find and load TensorFlow. The third runs
# itself, for HDF5 to crash in a process of its own.
RUN_PROGRAMS = {"devices.py": {"subprocess", "importlib"}, "hdf5_attributes.py": {"subprocess"}}

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("finetune/**/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_module_runs_text_or_unpacks_objects(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_NAMES | FORBIDDEN_CALLS, f"{path.name}, line {node.lineno}: {called}"
            assert not [option for option in node.keywords if option.arg in ("shell", "allow_pickle")]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            forbidden = FORBIDDEN_MODULES - RUN_PROGRAMS.get(path.name, set())
            found = {module.split(".")[0] for module in modules} & forbidden
            assert not found, f"{path.name}, line {node.lineno}: {found}"
            assert not {"system", "popen"} & {alias.name for alias in node.names}
