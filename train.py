"""Trains a classifier on the images of train_csv; all it writes goes to save_model_path.

With load_model_path it continues a run, and ends with the model that the run would have given without a stop.
"""

from __future__ import annotations

import glob
import math
import os
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from configs import Configs, UserError, run_script

if TYPE_CHECKING:
    import keras
    import numpy as np
    import tensorflow as tf

    from finetune.callbacks import Checkpoint, Interruption, Phase
    from generator import AugmentedImageSequence, Shares
    from model import TrainingModel
    from utils import Team

MODEL_STEMS = ("best_model", "latest_model", "model_epoch_*")
# What a run writes, as patterns: a new run into the same folder may not mix with it.
MODEL_FILES = tuple(f"{stem}.keras" for stem in MODEL_STEMS)
RUN_FILES = (*MODEL_FILES, "training_log.*", "best_auroc.log", ".training_stats.json", "configs.json", "data.json")
RUN_FILES += ("logs", "decision.json", "evaluation", "cam_output", "compression_report.json", "MODEL_CARD.md")


def main(configs: Configs) -> dict:
    """Trains, alone or with the other processes of TF_CONFIG; returns the last epoch's figures and the best."""
    # Imported here, so that --help does not wait for TensorFlow.
    from utils import join_team

    with join_team(configs) as team:
        return train(configs, team)


def train(configs: Configs, team: Team) -> dict:
    """Seeds, reads the data, builds or loads the model, trains; returns the last epoch's figures and the best."""
    from finetune.callbacks import Interruption, build_callbacks, check_same_data, locked
    from model import get_losses
    from utils import check_sets, get_settings, resolve_class_names, set_seed, start_devices

    model_path, state, configs = find_start(configs)
    team.agree(get_settings(configs))
    if state and has_ended(state, configs):
        print(f"This run has completed its {state['epochs_completed']} epochs. Raise num_epochs to go on.")
        return {"epochs_completed": state["epochs_completed"], "best": state["best"]}
    bad_rows = check_sets(list_sets(configs), configs, team.is_chief)
    strategy = start_devices(configs.gpu_percentage, configs.distribution_strategy)
    # Drawn or given, it is the chief's: order and shares follow from it.
    configs.random_seed = team.exchange(set_seed(configs.random_seed, configs.deterministic))[0]
    configs.classes = resolve_class_names(
        configs.classes, configs.train_csv, configs.csv_label_column, configs.multi_label_classification
    )
    training, validation = get_generators(configs, bad_rows, get_shares(strategy, team, configs))
    agree_on_start(team, training, validation, model_path)
    if state:
        check_same_data(state, training, validation)
    losses = get_losses(configs, training.labels)
    phases = get_phases(configs, strategy.num_replicas_in_sync)
    with strategy.scope():
        classifier, optimizer, features = get_model(configs, training, model_path, state, team)
    if configs.find_learning_rate:
        return find_learning_rate(configs, strategy, classifier, training, losses.training, team)
    with locked(configs.save_model_path, team.is_chief), Interruption(is_shared=team.size > 1) as interruption:
        if team.is_chief:
            prepare_folder(configs, training, validation)
        if configs.show_model_summary:
            classifier.summary()
        for phase in phases:
            if state and state["epochs_completed"] >= phase.end:
                continue
            with strategy.scope():
                model = prepare_phase(classifier, phase, configs, losses.training, optimizer, state)
                sets = get_sets(configs, phase, classifier, training, validation, features)
            callbacks = build_callbacks(configs, phase, classifier, *sets, losses.validation, interruption, team, state)
            fit(model, *sets, phase, state, callbacks, interruption)
            # The next phase goes on from here as a run does that continues: all from the chief's random states.
            state = team.exchange(callbacks[-1].state(phase.end, 0))[0]
            if model.stop_training:
                break
    return report(callbacks[-1], configs.save_model_path)


def find_start(configs: Configs) -> tuple[str, dict[str, Any] | None, Configs]:
    """Finds the model to continue from, if any, the state of its training, if it carries one, and the run's configs."""
    from finetune.callbacks import configs_to_continue, read_state
    from utils import resolve_model_path

    refuse_other_run(configs)
    if not configs.load_model_path:
        return "", None, configs
    path = resolve_model_path(configs.load_model_path, preferred=("latest_model.keras", "best_model.keras"))
    state = read_state(path)
    if state is None:
        print(f"{path} carries no training state: its weights are the start of a new run, at epoch 0.")
        return path, None, configs
    steps = f" and {state['steps_completed']} steps" * bool(state["steps_completed"])
    print(f"Continuing {path} after {state['epochs_completed']} epochs{steps}.")
    return path, state, configs_to_continue(configs, state, path)


def refuse_other_run(configs: Configs) -> None:
    """Raises UserError where save_model_path holds models that this run neither continues nor may remove."""
    folder = configs.save_model_path
    held = [path for pattern in MODEL_FILES for path in glob.glob(os.path.join(glob.escape(folder), pattern))]
    if held and not (starts_in_own_folder(configs) or configs.overwrite or configs.find_learning_rate):
        raise UserError(
            f"{folder} holds the models of another run ({os.path.basename(held[0])}). Continue it with "
            f"--load_model_path {folder}, choose another save_model_path, or remove it with --overwrite True."
        )


def starts_in_own_folder(configs: Configs) -> bool:
    """Tells whether load_model_path leads into save_model_path."""
    path = configs.load_model_path
    source = path if os.path.isdir(path) else os.path.dirname(path)
    return bool(path) and os.path.realpath(source) == os.path.realpath(configs.save_model_path)


def has_ended(state: dict[str, Any], configs: Configs) -> bool:
    """Tells whether a run has nothing left to do: its epochs are over, or it stopped early."""
    from finetune.callbacks import stops_early

    epochs = state["epochs_completed"]
    stopped = stops_early(epochs, state["best_epoch"], configs.early_stopping_patience, configs.head_epochs)
    return epochs >= configs.num_epochs or (stopped and not state["steps_completed"])


def list_sets(configs: Configs) -> dict[str, str]:
    """Returns the CSV files of a run's sets by name.

    The test set counts where it is also the validation set, or where its name is the user's choice as that of the
    training set is: an old data/testing_set.csv may be of other images.
    """
    sets = {"training": configs.train_csv, "validation": configs.validation_csv or configs.test_csv}
    is_chosen = "test_csv" in configs.given or "train_csv" not in configs.given
    if configs.validation_csv and is_chosen and os.path.isfile(configs.test_csv):
        sets["test"] = configs.test_csv
    return sets


def get_shares(strategy: tf.distribute.Strategy, team: Team, configs: Configs) -> Shares:
    """Finds out which of the devices that train together are this process's, and prints how many there are.

    Raises:
        UserError: the processes have different numbers of devices.
    """
    from generator import Shares

    if configs.distribution_strategy == "none":
        return Shares()
    devices = strategy.num_replicas_in_sync
    batch_size = configs.batch_size * configs.gradient_accumulation_steps
    local = devices // team.size
    team.agree({"the number of devices": local})
    print(f"Devices that train together: {devices}. Images a step: {devices} x {batch_size} = {devices * batch_size}.")
    return Shares(devices, local * team.index, local)


def agree_on_start(
    team: Team, training: AugmentedImageSequence, validation: AugmentedImageSequence, model_path: str
) -> None:
    """Raises UserError in every process where they do not start from the same images, labels and model file."""
    from finetune.callbacks import fingerprint
    from utils import hash_file

    if team.size > 1:
        digest = str(hash_file(model_path)) if model_path else ""
        values = {"the images and labels of train_csv": fingerprint(training)}
        values |= {"the images and labels of the validation set": fingerprint(validation)}
        team.agree(values | {"the model to start from": digest})


def get_generators(
    configs: Configs, bad_rows: dict[str, set[int]], shares: Shares
) -> tuple[AugmentedImageSequence, AugmentedImageSequence]:
    """Builds the generators of the training and of the validation images, without the bad rows of their CSV files."""
    from utils import get_generator

    validation_csv = configs.validation_csv or configs.test_csv
    if not configs.validation_csv:
        print(
            f"No validation_csv is given: the test set {configs.test_csv} also selects the best model, "
            "so its figures will be optimistic."
        )
    training = get_generator(configs.train_csv, configs.classes, configs, True, bad_rows[configs.train_csv], shares)
    validation = get_generator(validation_csv, configs.classes, configs, False, bad_rows[validation_csv], shares)
    print(f"{len(training.paths)} training images, {len(validation.paths)} validation images.")
    print(f"Classes: {', '.join(configs.classes)}")
    return training, validation


def get_model(
    configs: Configs, training: AugmentedImageSequence, model_path: str, state: dict[str, Any] | None, team: Team
) -> tuple[keras.Model, keras.optimizers.Optimizer | None, tuple[np.ndarray, np.ndarray] | None]:
    """Builds the classifier, or loads the one to start from, in the scope of the run's strategy.

    Returns:
        The classifier, with a state the optimizer that goes on too, and the features of the training images where the
        head has been started from them.
    """
    from model import ModelFactory
    from utils import load_fitting_model

    if not model_path:
        classifier = ModelFactory().get_model(configs)
        is_probed = configs.head_initialization == "linear_probe"
        return classifier, None, probe(classifier, configs, training, team) if is_probed else None
    size = configs.image_target_size[:2]
    classifier = load_fitting_model(model_path, configs.classes, size, with_optimizer=state is not None)
    return classifier, classifier.optimizer if state else None, None


def probe(
    classifier: keras.Model, configs: Configs, training: AugmentedImageSequence, team: Team
) -> tuple[np.ndarray, np.ndarray]:
    """Starts the classifier's head from a logistic regression on the features of the training images.

    Their mirror images count too, where training would show them.

    Returns:
        The features, and which images could be read, as `compute_features` does.
    """
    import numpy as np

    from model import compute_features, initialize_head

    features, is_read = compute_features(classifier, training)
    mirrored = None
    if configs.augmentation_strength != "none":
        mirrored = compute_features(classifier, training, mirrored=True)[0][is_read]
    labels, is_multi_label = training.labels[is_read], configs.multi_label_classification
    strength = initialize_head(classifier, features[is_read], labels, is_multi_label, configs.random_seed, mirrored)
    # Libraries of other hosts may round otherwise: the chief's weights are those of all.
    head = classifier.get_layer("classifier").get_layer("logits")
    weights = team.exchange([weight.tolist() for weight in head.get_weights()])[0]
    head.set_weights([np.array(weight) for weight in weights])
    print(f"The head starts from a logistic regression on {is_read.sum()} images, C = {strength:.3g}.")
    return features, is_read


def get_phases(configs: Configs, devices: int) -> list[Phase]:
    """Divides a run into the epochs that train the head alone, if any, and those that train all."""
    from finetune.callbacks import Phase

    factor = devices if configs.scale_learning_rate else 1
    if factor > 1:
        print(f"learning_rate is {configs.learning_rate} times {factor} devices: {configs.learning_rate * factor:g}.")
    border = min(configs.head_epochs, configs.num_epochs)
    rate = configs.learning_rate * factor
    later = rate if configs.fine_tune_learning_rate is None else configs.fine_tune_learning_rate * factor
    phases = [Phase(0, border, rate, True), Phase(border, configs.num_epochs, later if border else rate, False)]
    return [phase for phase in phases if phase.end > phase.first_epoch]


def prepare_phase(
    classifier: keras.Model,
    phase: Phase,
    configs: Configs,
    loss: Callable,
    optimizer: keras.optimizers.Optimizer | None,
    state: dict[str, Any] | None,
) -> TrainingModel:
    """Makes the layers trainable that learn in a phase, and builds what trains them.

    Args:
        classifier: the whole model.
        phase: of the run.
        configs: the options.
        loss: of the training images.
        optimizer: that of the state.
        state: of the checkpoint to continue from, which may be of this phase.
    """
    from model import get_training_model, prepare_backbone, split_head

    names = [layer.name for layer in classifier.layers]
    if "backbone" in names:
        convolutions = 0 if phase.trains_head_only else configs.conv_layers_to_train
        backbone = classifier.get_layer("backbone")
        prepare_backbone(backbone, convolutions, configs.batch_norm_momentum, configs.freeze_batch_norm)
    elif phase.trains_head_only:
        raise UserError(
            f"head_epochs: expected a model with a part named 'backbone'. Received: {', '.join(names)}. Set "
            "head_epochs to 0."
        )
    if "downscaling" in names:
        classifier.get_layer("downscaling").trainable = not phase.trains_head_only
    continues = is_within(state, phase)
    part = classifier
    if trains_on_features(classifier, phase, configs):
        part = split_head(classifier)
    model = get_training_model(part, configs, loss, optimizer if continues else None)
    # Checkpoints of before the option head_epochs have the one rate of their configs.
    if not continues or phase.learning_rate != state.get("learning_rate", state["configs"]["learning_rate"]):
        model.optimizer.learning_rate = phase.learning_rate
    return model


def is_within(state: dict[str, Any] | None, phase: Phase) -> bool:
    """Tells whether a checkpoint was written after the first step of a phase: its optimizer is that of the phase."""
    return bool(state) and (state["epochs_completed"], state["steps_completed"]) > (phase.first_epoch, 0)


def trains_on_features(classifier: keras.Model, phase: Phase, configs: Configs) -> bool:
    """Tells whether what comes before the head gives each image the same features in every epoch of a phase."""
    from model import has_fixed_features

    is_changed = configs.augmentation_strength != "none" or configs.mixup_alpha or configs.cutmix_alpha
    return not is_changed and has_fixed_features(classifier)


def get_sets(
    configs: Configs,
    phase: Phase,
    classifier: keras.Model,
    training: AugmentedImageSequence,
    validation: AugmentedImageSequence,
    features: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[AugmentedImageSequence, AugmentedImageSequence]:
    """Returns the images of a phase, or their features where those stay the same: they are computed once.

    Args:
        configs: the options.
        phase: of the run.
        classifier: in the scope of the run's strategy.
        training: the training images.
        validation: the validation images.
        features: those of the training images, and which of these could be read, where they are known.
    """
    from generator import FeatureSequence
    from model import compute_features

    if not trains_on_features(classifier, phase, configs):
        return training, validation
    print("The backbone is frozen and the images do not change: their features are computed once.")
    features = features or compute_features(classifier, training)
    others = compute_features(classifier, validation)
    return FeatureSequence.of(training, *features), FeatureSequence.of(validation, *others)


def find_learning_rate(
    configs: Configs,
    strategy: tf.distribute.Strategy,
    classifier: keras.Model,
    training: AugmentedImageSequence,
    loss: Callable,
    team: Team,
) -> dict:
    """Trains with rising learning rates, plots the loss over them into the run's folder and suggests one.

    Source: Smith, WACV 2017 (arXiv:1506.01186).
    """
    from finetune.callbacks import EpochOrder, Interruption, RangeTest
    from finetune.metrics import suggest_learning_rate
    from finetune.report import draw_learning_rate
    from utils import naming_bad_images

    phase = get_phases(configs, strategy.num_replicas_in_sync)[0]
    with strategy.scope():
        model = prepare_phase(classifier, phase, configs, loss, None, None)
        images = get_sets(configs, phase, classifier, training, training)[0]
    test = RangeTest()
    epochs = 1 + math.ceil(test.steps / images.steps)
    with naming_bad_images(images):
        model.fit(images.to_dataset(), epochs, 0, [EpochOrder(images), test], Interruption())
    suggestion = suggest_learning_rate(test.rates, test.losses)
    path = os.path.join(configs.save_model_path, "learning_rate.png")
    if team.is_chief:
        draw_learning_rate(test.rates, test.losses, suggestion, path)
    print(f"Suggested learning_rate: {suggestion:.2g}. The curve is in {path}")
    return {"suggestion": suggestion, "rates": test.rates, "losses": test.losses}


def prepare_folder(configs: Configs, training: AugmentedImageSequence, validation: AugmentedImageSequence) -> None:
    """Makes the run's folder ready, and writes its configs and what its data are into it."""
    from utils import write_json

    clear_folder(configs)
    write_json(os.path.join(configs.save_model_path, "configs.json"), configs.to_dict())
    sets = {
        "training": describe_set(configs.train_csv, training, configs.classes),
        "validation": describe_set(configs.validation_csv or configs.test_csv, validation, configs.classes),
    }
    write_json(os.path.join(configs.save_model_path, "data.json"), sets)


def describe_set(csv_path: str, sequence: AugmentedImageSequence, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns a set's `csv`, `images`, images of each of its `classes` and the `sha256` of `callbacks.fingerprint`."""
    import numpy as np

    from finetune.callbacks import fingerprint

    labels = sequence.labels
    counts = np.bincount(labels, minlength=len(class_names)) if labels.ndim == 1 else labels.sum(axis=0)
    classes = dict(zip(class_names, counts.astype(int).tolist(), strict=True))
    return {"csv": csv_path, "images": len(labels), "classes": classes, "sha256": fingerprint(sequence)}


def clear_folder(configs: Configs) -> None:
    """Removes what killed processes left in the run's folder and, to overwrite, the run that it holds.

    A run that goes on loses its decision and its model card: they belong to the model that it is about to replace.
    """
    from finetune.callbacks import remove_stale_files

    folder = configs.save_model_path
    remove_stale_files(folder)
    for name in ("decision.json", "MODEL_CARD.md"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            os.remove(path)
            print(f"Removed {path}: it belongs to the model before. Run test.py after training.")
    if configs.overwrite and not starts_in_own_folder(configs):
        for pattern in (*RUN_FILES, *list_derived_files()):
            for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
                # Of a link the name goes, not what it leads to.
                is_folder = os.path.isdir(path) and not os.path.islink(path)
                shutil.rmtree(path) if is_folder else os.remove(path)


def list_derived_files() -> list[str]:
    """Returns patterns of what compress_weights.py makes of a run's models, and of test.py's evaluations of that."""
    from utils import ARTEFACT_ENDINGS, REJECTED

    parts = {*ARTEFACT_ENDINGS.values(), ("_compressed", ".json"), ("_labels", ".txt"), ("_metadata", ".json")}
    names = [
        f"{stem}{ending}{mark}{suffix}" for stem in MODEL_STEMS for ending, suffix in parts for mark in ("", REJECTED)
    ]
    return [*names, *(f"evaluation_{name}" for name in names)]


def fit(
    model: TrainingModel,
    training: AugmentedImageSequence,
    validation: AugmentedImageSequence,
    phase: Phase,
    state: dict[str, Any] | None,
    callbacks: list[keras.callbacks.Callback],
    interruption: Interruption,
) -> None:
    """Runs the epochs of a phase with a progress bar, from the state's step on.

    Raises:
        UserError: an image turns out to be unreadable, or the loss is not finite.
    """
    from utils import naming_bad_images

    def run(first_epoch: int, end: int) -> None:
        """Trains the epochs from `first_epoch` to before `end`, counted from 0."""
        model.fit(training.to_dataset(), end, first_epoch, callbacks, interruption)

    first_epoch, first_step = phase.first_epoch, 0
    if is_within(state, phase):
        first_epoch, first_step = state["epochs_completed"], state["steps_completed"]
    with naming_bad_images(training, validation):
        if first_step:
            # The rest of an epoch has fewer steps than those after it.
            training.first_step = first_step
            run(first_epoch, first_epoch + 1)
            training.first_step, first_epoch = 0, first_epoch + 1
        if first_epoch < phase.end and not model.stop_training:
            run(first_epoch, phase.end)


def report(checkpoint: Checkpoint, save_model_path: str) -> dict:
    """Writes the model card, prints the best epoch and where everything is; returns its figures with the last's."""
    if checkpoint.writes:
        from finetune.report import write_model_card

        write_model_card(save_model_path)
    if checkpoint.best is None:
        print(f"{checkpoint.monitor} is undefined in every epoch, so no model is the best one.")
    else:
        print(f"Best {checkpoint.monitor}: {checkpoint.best:.4f} in epoch {checkpoint.best_epoch}.")
    print(f"Models and logs are in {save_model_path}")
    return {"best": checkpoint.best, "best_epoch": checkpoint.best_epoch} | checkpoint.log[-1]


if __name__ == "__main__":
    run_script(main)
