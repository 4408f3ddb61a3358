"""Trains a classifier on the images of train_csv; all it writes goes to save_model_path."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from configs import Configs, run_script

if TYPE_CHECKING:
    import keras

    from callbacks import Checkpoint
    from generator import AugmentedImageSequence


def main(configs: Configs) -> dict:
    """Seeds, reads the data, builds or loads the model, trains; returns the last epoch's figures and the best."""
    # Imported here, so that --help does not wait for TensorFlow.
    from callbacks import build_callbacks
    from model import get_loss
    from utils import keep_freed_memory, naming_bad_images, resolve_class_names, set_gpu_usage, set_seed, write_json

    set_gpu_usage(configs.gpu_percentage)
    keep_freed_memory()
    configs.random_seed = set_seed(configs.random_seed)
    configs.classes = resolve_class_names(
        configs.classes, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
    )
    training, validation = get_generators(configs)
    loss, class_weights = get_loss(configs, training.labels)
    model, state = get_model(configs, loss)
    first_epoch = state["epochs_completed"] if state else 0
    if first_epoch >= configs.num_epochs:
        print(f"This run has completed its {first_epoch} epochs. Raise num_epochs to go on.")
        return {"epochs_completed": first_epoch, "best": state["best"]}

    write_json(os.path.join(configs.save_model_path, "configs.json"), configs.to_dict())
    if configs.show_model_summary:
        model.summary()
    callbacks = build_callbacks(configs, training, validation, loss, state)
    with naming_bad_images(training, validation):
        model.fit(
            training,
            epochs=configs.num_epochs,
            initial_epoch=first_epoch,
            class_weight=class_weights,
            callbacks=callbacks,
            shuffle=False,
        )
    return report(callbacks[-1], configs.save_model_path)


def get_generators(configs: Configs) -> tuple[AugmentedImageSequence, AugmentedImageSequence]:
    """Builds the generators of the training and of the validation images."""
    from utils import get_generator

    validation_csv = configs.validation_csv or configs.test_csv
    if not configs.validation_csv:
        print(
            f"No validation_csv is given: the test set {configs.test_csv} also selects the best model, "
            "so its figures will be optimistic."
        )
    training = get_generator(configs.train_csv, configs.classes, configs, training=True)
    validation = get_generator(validation_csv, configs.classes, configs, training=False)
    print(f"{len(training.paths)} training images, {len(validation.paths)} validation images.")
    print(f"Classes: {', '.join(configs.classes)}")
    return training, validation


def get_model(configs: Configs, loss: Callable) -> tuple[keras.Model, dict[str, Any] | None]:
    """Builds the model, or loads the one to continue from with the state of its training, if it carries one."""
    from callbacks import read_state
    from model import ModelFactory, compile_model
    from utils import load_fitting_model, resolve_model_path

    if not configs.load_model_path:
        model = ModelFactory().get_model(configs)
        return compile_model(model, configs, loss), None
    path = resolve_model_path(configs.load_model_path, preferred=("latest_model.keras", "best_model.keras"))
    state = read_state(path)
    model = load_fitting_model(path, configs.classes, configs.image_target_size[:2], with_optimizer=state is not None)
    if state is None:
        print(f"{path} carries no training state: its weights are the start of a new run, at epoch 0.")
    else:
        print(f"Continuing {path} after epoch {state['epochs_completed']}.")
    return compile_model(model, configs, loss, optimizer=model.optimizer if state else None), state


def report(checkpoint: Checkpoint, save_model_path: str) -> dict:
    """Prints the best epoch and where everything is; returns its figures with the last epoch's."""
    print(f"Best {checkpoint.monitor}: {checkpoint.best:.4f} in epoch {checkpoint.best_epoch}.")
    print(f"Models and logs are in {save_model_path}")
    return {"best": checkpoint.best, "best_epoch": checkpoint.best_epoch} | checkpoint.log[-1]


if __name__ == "__main__":
    run_script(main)
