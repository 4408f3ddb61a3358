"""SavedModels from elsewhere: those that do more than compute are not loaded."""

import os

import pytest
import tensorflow as tf

from finetune.core.options import UserError
from finetune.predicting.predicting import load_exported_model


def save_program(folder, compute):
    """Saves a SavedModel that runs a function."""
    module = tf.Module()
    module.serve = tf.function(compute, input_signature=[tf.TensorSpec((None, 32, 32, 3), tf.float32, "image")])
    tf.saved_model.save(module, str(folder), signatures=module.serve)


@pytest.mark.parametrize("case", ["writes a file", "writes in a branch", "runs Python", "saves"])
def test_a_saved_model_that_does_more_than_compute_is_refused(case, tmp_path):
    mark = str(tmp_path / "mark")

    def write(image):
        tf.io.write_file(mark, "hello")
        return image[:, 0, 0]

    def branch(image):
        return tf.cond(tf.reduce_sum(image) > 0, lambda: write(image), lambda: image[:, 0, 1])

    def run_python(image):
        return tf.py_function(lambda x: (open(mark, "w").close(), x[:, 0, 0])[1], [image], tf.float32)

    def save(image):
        tf.raw_ops.SaveV2(prefix=mark, tensor_names=["a"], shape_and_slices=[""], tensors=[image])
        return image[:, 0, 0]

    programs = {"writes a file": write, "writes in a branch": branch, "runs Python": run_python, "saves": save}
    save_program(tmp_path / "model", programs[case])
    with pytest.raises(UserError, match="not loaded: it holds (WriteFile|If|EagerPyFunc|SaveV2)"):
        load_exported_model(str(tmp_path / "model"))
    assert not os.path.exists(mark)


def test_a_saved_model_with_a_table_is_refused(tmp_path):
    module = tf.Module()
    source = tf.lookup.KeyValueTensorInitializer(["cat", "dog"], tf.constant([0, 1], tf.int64))
    module.table = tf.lookup.StaticHashTable(source, 0)

    def look_up(image):
        return image[:, 0, 0] + tf.cast(module.table.lookup(tf.constant("cat")), tf.float32)

    module.serve = tf.function(look_up, input_signature=[tf.TensorSpec((None, 32, 32, 3), tf.float32, "image")])
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=module.serve)
    with pytest.raises(UserError, match="is not loaded: it holds "):
        load_exported_model(str(tmp_path / "model"))


def test_a_saved_model_of_tensorflow_1_is_refused(tmp_path):
    # Loading it runs its initialising op.
    mark = str(tmp_path / "mark")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        image = tf.compat.v1.placeholder(tf.float32, (None, 32, 32, 3))
        program = tf.io.write_file(mark, "hello")
        signature = tf.compat.v1.saved_model.predict_signature_def({"image": image}, {"output_0": image[:, 0, 0]})
        builder = tf.compat.v1.saved_model.Builder(str(tmp_path / "model"))
        builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": signature}, main_op=program)
        builder.save()
    with pytest.raises(UserError, match="TensorFlow 1"):
        load_exported_model(str(tmp_path / "model"))
    assert not os.path.exists(mark)
    # TensorFlow alone would run it.
    tf.saved_model.load(str(tmp_path / "model"))
    assert os.path.exists(mark)
