"""The model as it is saved and tested: the classifier itself, or the mean of its answers to an image and its mirror."""

from __future__ import annotations

import keras

MEAN_OF_VIEWS = "mean_of_views"


def build_inference_model(classifier: keras.Model, test_time_augmentation: str) -> keras.Model:
    """Builds what a file holds: whatever reads it then answers as the run's validation did.

    Source: Krizhevsky et al., NIPS 2012, section 4.1, of the mirror images.

    Args:
        classifier: from images `(batch, height, width, 3)` to probabilities `(batch, classes)`; it is shared.
        test_time_augmentation: `none` or `flip`.

    Returns:
        A model of stock layers with the classifier's shapes and weights; its `optimizer` is not set.
    """
    if test_time_augmentation == "none":
        return keras.Model(classifier.inputs, classifier.outputs, name=classifier.name)
    (image,) = classifier.inputs
    images = keras.Input(image.shape[1:], dtype=image.dtype, name=image.name)
    # A model that was read from a file may give its one output in a list.
    views = keras.tree.flatten([classifier(images), classifier(keras.ops.flip(images, axis=2))])
    return keras.Model(images, keras.layers.Average(name="mean")(views), name=MEAN_OF_VIEWS)


def get_classifier(model: keras.Model) -> keras.Model:
    """Returns the classifier, which answers to an image as it is, of a model as it is saved; any other model itself."""
    if model.name != MEAN_OF_VIEWS:
        return model
    (classifier,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    return classifier


def has_views(model: keras.Model) -> bool:
    """Tells whether a model answers with the mean over an image and its mirror image."""
    return get_classifier(model) is not model
