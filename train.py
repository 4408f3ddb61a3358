"""Trains a classifier on the images of train_csv; all it writes goes to save_model_path."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import keras

from callbacks import Checkpoint, EpochOrder, Validation, read_state
from configs import Configs, run_script
from generator import AugmentedImageSequence
from model import ModelFactory, compile_model, weighted_binary_crossentropy
from utils import (
    check_model_fits,
    get_class_weights,
    get_generator,
    get_multilabel_class_weights,
    load_model,
    naming_bad_images,
    resolve_class_names,
    resolve_model_path,
    set_gpu_usage,
    set_seed,
    write_json,
)


def main(configs: Configs) -> dict:
    """Seeds, reads the data, builds or loads the model, trains; returns the last epoch's figures and the best."""
    set_gpu_usage(configs.gpu_percentage)
    configs.random_seed = set_seed(configs.random_seed)
    configs.classes = resolve_class_names(
        configs.classes, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
    )
    training, validation = get_generators(configs)
    loss, class_weights = get_loss(configs, training)
    model, state = get_model(configs, loss)
    first_epoch = state["epochs_completed"] if state else 0
    if first_epoch >= configs.num_epochs:
        print(f"This run has completed its {first_epoch} epochs. Raise num_epochs to go on.")
        return {"epochs_completed": first_epoch, "best": state["best"]}
    write_json(os.path.join(configs.save_model_path, "configs.json"), configs.to_dict())
    callbacks = get_callbacks(configs, training, validation, loss, state)
    if configs.show_model_summary:
        model.summary()
    fit(model, training, validation, configs.num_epochs, first_epoch, class_weights, callbacks)
    checkpoint = callbacks[-1]
    print(f"Best {checkpoint.monitor}: {checkpoint.best:.4f} in epoch {checkpoint.best_epoch}.")
    print(f"Models and logs are in {configs.save_model_path}")
    return {"best": checkpoint.best, "best_epoch": checkpoint.best_epoch} | checkpoint.log[-1]


def get_generators(configs: Configs) -> tuple[AugmentedImageSequence, AugmentedImageSequence]:
    """Builds the generators of the training and of the validation images."""
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


def get_loss(configs: Configs, training: AugmentedImageSequence) -> tuple[Callable, dict[int, float] | None]:
    """Returns the loss, weighted by class in multi-label mode, and the class weights of single-label mode."""
    if configs.multi_label_classification:
        weights = get_multilabel_class_weights(
            training.labels, configs.positive_weights_multiply, configs.use_class_balancing
        )
        return weighted_binary_crossentropy(weights), None
    weights = get_class_weights(training.labels, len(configs.classes)) if configs.use_class_balancing else None
    return keras.losses.sparse_categorical_crossentropy, weights


def get_model(configs: Configs, loss: Callable) -> tuple[keras.Model, dict[str, Any] | None]:
    """Builds the model, or loads the one to continue from with the state of its training, if it carries one."""
    if not configs.load_model_path:
        model = ModelFactory().get_model(configs)
        return compile_model(model, configs, loss), None
    path = resolve_model_path(configs.load_model_path, preferred=("latest_model.keras", "best_model.keras"))
    state = read_state(path)
    model = load_model(path, with_optimizer=state is not None)
    check_model_fits(model, path, configs.classes, configs.image_target_size[:2])
    if state is None:
        print(f"{path} carries no training state: its weights are the start of a new run, at epoch 0.")
    else:
        print(f"Continuing {path} after epoch {state['epochs_completed']}.")
    return compile_model(model, configs, loss, optimizer=model.optimizer if state else None), state


def get_callbacks(
    configs: Configs,
    training: AugmentedImageSequence,
    validation: AugmentedImageSequence,
    loss: Callable,
    state: dict[str, Any] | None,
) -> list[keras.callbacks.Callback]:
    """Builds the callbacks in the order that they need: measure, schedule, log, then save."""
    multi_label = configs.multi_label_classification
    measure = Validation(validation, loss, multi_label)
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="val_loss",
        factor=configs.learning_rate_decay_factor,
        patience=configs.reduce_lr_patience,
        min_lr=configs.minimum_learning_rate,
        verbose=1,
    )
    logs = keras.callbacks.TensorBoard(os.path.join(configs.save_model_path, "logs"), write_graph=False)
    checkpoint = Checkpoint(
        configs.save_model_path,
        "val_auroc" if multi_label else "val_accuracy",
        plateau,
        configs.save_best_model_only,
        measure,
        configs.classes,
        state,
    )
    return [EpochOrder(training), measure, plateau, logs, checkpoint]


def fit(
    model: keras.Model,
    training: AugmentedImageSequence,
    validation: AugmentedImageSequence,
    num_epochs: int,
    first_epoch: int,
    class_weights: dict[int, float] | None,
    callbacks: list[keras.callbacks.Callback],
) -> None:
    """Runs Keras's fit with a progress bar; raises UserError where an image turns out to be unreadable."""
    with naming_bad_images(training, validation):
        model.fit(
            training,
            epochs=num_epochs,
            initial_epoch=first_epoch,
            class_weight=class_weights,
            callbacks=callbacks,
            shuffle=False,
        )


if __name__ == "__main__":
    run_script(main)
