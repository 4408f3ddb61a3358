"""The head fitted to a run's training images, before training and refitted after it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import keras
import numpy as np

from configs import Configs
from finetune.data.groups import describe_groups, describe_lone_classes, find_lone_classes
from finetune.models.heads import HEAD, LOGITS
from finetune.models.losses import get_class_weights
from finetune.training.feature_store import find_features
from finetune.training.probe import (
    FeaturesNotFinite,
    build_extractor,
    compute_features,
    extract_features,
    initialize_head,
)
from finetune.training.trainer import TrainingModel
from finetune.training.workers import Team
from generator import AugmentedImageSequence


class HeadFit:
    """Makes a model's head the logistic regression on the current features of the training images.

    If training augments images, their mirror images count too; if it balances the classes, so does this.

    Args:
        configs: of the run.
        model: its head is changed, in the scope of the run's strategy.
        training: the training images.
        team: all its processes get the chief's weights.
    """

    def __init__(self, configs: Configs, model: keras.Model, training: AugmentedImageSequence, team: Team) -> None:
        self.seed = configs.random_seed
        self.mirrors = configs.augmentation_strength != "none"
        self.class_weights = None
        if configs.use_class_balancing and not configs.multi_label_classification:
            self.class_weights = np.array([*get_class_weights(training.labels, len(configs.classes)).values()])
        self.class_names = configs.classes
        self.model = model
        self.training = training
        self.team = team
        # A graph takes seconds to build; it always uses the current weights.
        self._get_extractor: Callable[[bool], TrainingModel] = functools.cache(
            functools.partial(build_extractor, model)
        )

    def start(self, store: str) -> tuple[np.ndarray, np.ndarray]:
        """Fits the head; returns the features and which images could be read, as `compute_features` does.

        Args:
            store: the folder of features from other scripts, or empty; several processes compute their own.
        """
        find = functools.partial(find_features, folder=store) if self.team.size == 1 and store else compute_features
        features, is_read, strength = self._fit(lambda mirrored: find(self.model, self.training, mirrored=mirrored))
        groups, number = self.training.get_groups(is_read), len(self.class_names)
        images = f"{is_read.sum()} images{describe_groups(groups)}"
        print(f"The head starts from a logistic regression on {images}, C = {strength:.3g}.")
        lone = find_lone_classes(self.training.labels[is_read], groups, number)
        if lone.size:
            print(describe_lone_classes([self.class_names[position] for position in lone]))
        return features, is_read

    def refit(self) -> None:
        """Refits the head to the current features; keeps it if they are not finite."""
        with contextlib.suppress(FeaturesNotFinite):
            self._fit(lambda mirrored: extract_features(self._get_extractor(mirrored), self.training, mirrored))

    def _fit(self, find: Callable[[bool], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, float]:
        """Fits the head to the features of images (and mirror images); returns them with `is_read` and the strength."""
        features, is_read = find(False)
        views = [features[is_read]]
        if self.mirrors:
            views.append(find(True)[0][is_read])
        labels, groups = self.training.labels[is_read], self.training.get_groups(is_read)
        strength = initialize_head(self.model, views, labels, self.seed, self.class_weights, groups)
        # Hosts may round differently: all take the chief's weights.
        logits = self.model.get_layer(HEAD).get_layer(LOGITS)
        weights = self.team.exchange([weight.tolist() for weight in logits.get_weights()])[0]
        logits.set_weights([np.array(weight) for weight in weights])
        return features, is_read, strength
