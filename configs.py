"""All options: name, type, default, meaning and bounds.

Edit a default below, or override it: `--configs FILE.json` beats the default, and a command-line flag beats both. The
declaration of an option is also its type check, its `--help` entry and its flag.
"""

from __future__ import annotations

import dataclasses

from finetune.core.options import Exclusion, Options, define
from finetune.core.values import (
    classes_fault,
    duration_fault,
    eval_image_size_fault,
    folder_fault,
    image_size_fault,
    layer_sizes_fault,
    pixel_range_fault,
    range_fault,
    scaling_fault,
)

# Keras's defaults; the paper and PyTorch use an epsilon of 1e-8.
ADAM_BETA_2, ADAM_EPSILON = 0.999, 1e-7
VERIFY_MODES = ("quick", "full", "headers", "off")
MAX_IMAGE_PIXELS = 179_000_000
DISTRIBUTION_STRATEGIES = ("none", "mirrored", "multi_worker")
CAM_METHODS = ("gradcam", "gradcam++", "hirescam", "layercam")
CAM_CLASSES = ("predicted", "true", "top_k", "threshold")
RESIZE_MODES = ("stretch", "crop", "pad")
CAM_COLORMAPS = ("jet", "turbo", "viridis", "inferno", "magma", "plasma")


@dataclasses.dataclass
class Configs(Options):
    """The options that every script takes. Building one reads no file; `validate` checks them all at once."""

    train_csv: str = define(
        "./data/training_set.csv", "CSV file of the training images and their labels", group="common"
    )
    test_csv: str = define(
        "./data/testing_set.csv", "CSV file of the images for test.py; training never learns from them", group="common"
    )
    image_directory: str = define("", "Folder that the paths in the CSV files are relative to", group="data")
    visual_model_name: str = define(
        "DenseNet121",
        "Backbone: one of those listed in docs/options.md, kerashub:PRESET, kerashub:FOLDER, or a Keras model file",
        describes_model=True,
        group="common",
    )
    image_target_size: tuple[int, int, int] = define(
        (224, 224, 3),
        "Height, width and channels that images are resized to",
        at_least=1,
        at_most=16384,
        describes_model=True,
        check=image_size_fault,
        group="common",
    )
    eval_image_size: list[int] = define(
        [],
        "Height and width for validation, testing and prediction; empty uses image_target_size",
        at_least=1,
        at_most=16384,
        describes_model=True,
        check=eval_image_size_fault,
        group="recipe",
    )
    backbone_preprocessing: list[str] = define(
        [],
        "Input scaling of a model file or preset: torch, tf, caffe, none, or two numbers; empty for the preset's own",
        describes_model=True,
        check=scaling_fault,
        group="model",
    )
    resize_mode: str = define(
        "stretch",
        "Fit images to the target size by distorting them (stretch), cropping the centre (crop) or adding "
        "grey borders (pad)",
        choices=RESIZE_MODES,
        describes_model=True,
        group="data",
    )
    num_epochs: int = define(100, "Total number of epochs, including those before a resume", at_least=1, group="common")
    csv_label_column: str = define("class", "CSV column that contains the labels", group="data")
    classes: list[str] | None = define(
        None,
        "Class names in the model's order; none takes them from train_csv, sorted",
        describes_model=True,
        check=classes_fault,
        group="data",
    )
    multi_label_classification: bool = define(
        False, "Several labels per image, written class1$class2 in the CSV files", describes_model=True, group="common"
    )
    classifier_layer_sizes: list[float] = define(
        [0.4],
        "Head layers before the output: values of 1 or more are hidden units, values below 1 are dropout rates",
        at_least=0,
        at_most=2**20,
        describes_model=True,
        check=layer_sizes_fault,
        group="model",
    )
    head: str = define(
        "dense", "Type of the head, a name in finetune/models/heads.py", describes_model=True, group="model"
    )
    conv_layers_to_train: int = define(
        -1,
        "Number of the backbone's last convolutions, or blocks of a transformer, to train; -1 trains all, 0 none",
        at_least=-1,
        fixed_in_run=True,
        group="model",
    )
    use_imagenet_weights: bool = define(
        True, "Start the backbone from ImageNet weights instead of random weights", group="model"
    )
    pop_conv_layers: int = define(
        0, "Number of layers to remove from the end of the backbone", at_least=0, describes_model=True, group="model"
    )
    final_layer_pooling: str | None = define(
        "avg",
        "Pooling of the features; none flattens them",
        choices=("avg", "max"),
        describes_model=True,
        group="model",
    )
    load_model_path: str = define(
        "", "Model file or run folder to continue, to test or to predict with", group="common"
    )
    save_model_path: str = define(
        "saved_model", "Folder for everything that a run writes", check=folder_fault, group="common"
    )
    save_best_model_only: bool = define(
        True, "Keep only the best and the latest model; False also keeps the model of every epoch", group="training"
    )
    learning_rate: float = define(1e-3, "Learning rate of the optimizer", above=0, group="common")
    learning_rate_decay_factor: float = define(
        0.1, "Factor on the learning rate at a plateau of the validation loss", above=0, below=1, group="training"
    )
    reduce_lr_patience: int = define(
        3, "Epochs without a lower validation loss that count as a plateau", at_least=0, group="training"
    )
    minimum_learning_rate: float = define(
        1e-7, "Lowest learning rate that a schedule may reach", at_least=0, group="training"
    )
    optimizer_type: str = define(
        "Adam",
        "Optimizer: Adam, Adamax, Nadam, AdamW, SGD, RMSprop, Adagrad, Adadelta or Lion",
        fixed_in_run=True,
        group="training",
    )
    gpu_percentage: float = define(
        0.95, "Share of each visible GPU's memory to use; 0 runs on the CPU", at_least=0, at_most=1, group="machine"
    )
    batch_size: int = define(
        16, "Number of images in a batch, on each device", at_least=1, fixed_in_run=True, group="common"
    )
    multilabel_threshold_range: list[float] = define(
        [0.01, 0.99],
        "Lowest and highest decision threshold to try, in steps of 0.01",
        above=0,
        below=1,
        check=range_fault,
        group="explaining",
    )
    max_error: float = define(
        0.0,
        "Largest share of wrong answers that test.py promises, by leaving unsure images unanswered; 0 answers all",
        at_least=0,
        below=0.5,
        group="explaining",
    )
    unknown_rate: float = define(
        0.01,
        "Share of images like the training ones that may be called unknown; 0 calls none unknown",
        at_least=0,
        at_most=0.2,
        group="explaining",
    )
    report_by: str = define(
        "", "Column of test_csv, such as site or camera, whose values test.py reports separately", group="explaining"
    )
    generator_workers: int = define(
        4, "Threads, or above 4 processes, that load and augment images; 0 counts as 1", at_least=0, group="speed"
    )
    generator_queue_length: int = define(12, "Number of batches to keep ready for the model", at_least=1, group="speed")
    show_model_summary: bool = define(True, "Print the model's layers before training", group="model")
    positive_weights_multiply: float = define(
        1.0, "Multi-label: factor on the loss of present labels", above=0, fixed_in_run=True, group="training"
    )
    use_class_balancing: bool = define(
        True, "Give rare classes more weight in the loss", fixed_in_run=True, group="training"
    )
    cnn_downscaling_factor: int = define(
        0,
        "Number of trainable convolutions before the backbone that each halve the image; 0 adds none",
        at_least=0,
        at_most=14,
        describes_model=True,
        group="model",
    )
    cnn_downscaling_filters: int = define(
        64, "Filters of each downscaling convolution", at_least=1, at_most=2**16, describes_model=True, group="model"
    )
    validation_csv: str = define(
        "", "CSV file of the images that select the best model; empty uses test_csv", group="common"
    )
    random_seed: int | None = define(
        0,
        "Seed of weights, order, augmentation and splits; none draws a random seed",
        at_least=0,
        at_most=2**32 - 1,
        fixed_in_run=True,
        group="training",
    )
    batch_norm_momentum: float | None = define(
        0.9,
        "Momentum of the backbone's batch normalisation; none keeps the backbone's own",
        at_least=0,
        below=1,
        fixed_in_run=True,
        group="model",
    )
    deterministic: bool = define(
        False, "Make two runs give the same weights to the last bit; slower on a GPU", group="machine"
    )
    checkpoint_every_steps: int = define(
        0, "Steps between extra saves of latest_model.keras; 0 saves it after each epoch", at_least=0, group="training"
    )
    early_stopping_patience: int = define(
        0,
        "Epochs without a better validation metric before training stops; 0 never stops early",
        at_least=0,
        excludes=Exclusion(
            0,
            "model_selection",
            ("best_epoch",),
            "expected 0 unless model_selection is best_epoch: the others need the whole schedule",
        ),
        group="training",
    )
    mixed_precision: bool = define(
        False,
        "Compute in 16 bits: bfloat16, or float16 with loss scaling on GPUs that lack bfloat16",
        describes_model=True,
        group="speed",
    )
    image_cache: str = define(
        "none",
        "Keep decoded, resized images in memory, or on disk for later runs too; none keeps none",
        choices=("none", "memory", "disk"),
        group="speed",
    )
    image_cache_path: str = define(
        "./data/image_cache", "Folder of the disk cache and stored features; may be deleted at any time", group="speed"
    )
    verify_data: str = define(
        "quick",
        "Check images and find near copies: about a minute (quick), everything (full), only headers "
        "(headers) or nothing (off)",
        choices=VERIFY_MODES,
        group="data",
    )
    max_image_pixels: int = define(
        MAX_IMAGE_PIXELS, "Largest number of pixels in an image, checked before decoding", at_least=1, group="data"
    )
    pixel_range: list[float] = define(
        [],
        "Black and white values of float and 32-bit integer TIFFs, or one pair each; empty takes the "
        "training set's range",
        describes_model=True,
        check=pixel_range_fault,
        group="data",
    )
    skip_bad_images: bool = define(
        False, "Leave out and report images that cannot be read, instead of stopping", group="data"
    )
    allow_duplicates: bool = define(
        False, "Only warn if the same image is in two sets, instead of stopping", group="data"
    )
    cam_method: str = define(
        "gradcam", "Method by which draw_activations.py computes heatmaps", choices=CAM_METHODS, group="explaining"
    )
    cam_classes: str = define(
        "predicted",
        "Classes that draw_activations.py explains: predicted, true, the cam_top_k most probable, or those "
        "above their threshold",
        choices=CAM_CLASSES,
        group="explaining",
    )
    cam_top_k: int = define(3, "Number of classes that cam_classes top_k explains", at_least=1, group="explaining")
    cam_alpha: float = define(0.4, "Opacity of the heatmap over the image", at_least=0, at_most=1, group="explaining")
    cam_colormap: str = define("jet", "Colour map of the heatmap", choices=CAM_COLORMAPS, group="explaining")
    cam_backbone_layer: str = define(
        "", "Backbone layer whose features make the heatmap; empty takes the last spatial layer", group="explaining"
    )
    cam_picture_size: int = define(
        640, "Longest side of a photo in draw_activations.py's pictures, in pixels", at_least=160, group="explaining"
    )
    distribution_strategy: str = define(
        "none",
        "Train on one device (none), all GPUs of this machine (mirrored), or several hosts by TF_CONFIG or "
        "Slurm (multi_worker)",
        choices=DISTRIBUTION_STRATEGIES,
        group="machine",
    )
    scale_learning_rate: bool = define(False, "Multiply the learning rate by the number of devices", group="machine")
    head_epochs: int = define(
        0, "Number of epochs at the start that train only the head", at_least=0, fixed_in_run=True, group="recipe"
    )
    fine_tune_learning_rate: float | None = define(
        None,
        "Learning rate after head_epochs; none keeps learning_rate",
        above=0,
        needs=("head_epochs", "head_epochs of 1 or more"),
        group="recipe",
    )
    head_initialization: str = define(
        "random",
        "Start the head from random weights, or from a logistic regression on the backbone's features (linear_probe)",
        choices=("random", "linear_probe"),
        group="recipe",
    )
    learning_rate_schedule: str = define(
        "plateau",
        "Learning rate schedule: reduced on a plateau, cosine decay, a rise before the cosine (one_cycle), or constant",
        choices=("plateau", "cosine", "one_cycle", "constant"),
        group="recipe",
    )
    warmup_epochs: float = define(
        0.0, "Number of epochs, or a fraction, in which the learning rate rises from 0", at_least=0, group="recipe"
    )
    backbone_learning_rate_multiplier: float = define(
        1.0, "Factor that multiplies the learning rate of the backbone", above=0, at_most=100, group="recipe"
    )
    freeze_batch_norm: bool = define(
        False, "Freeze the batch normalisation layers of the backbone", fixed_in_run=True, group="recipe"
    )
    weight_decay: float = define(
        0.0,
        "Decoupled weight decay of kernels; biases and normalisation layers are not decayed",
        at_least=0,
        below=1,
        fixed_in_run=True,
        group="recipe",
    )
    adam_beta_2: float = define(
        ADAM_BETA_2,
        "Decay rate of Adam's moving average of squared gradients",
        at_least=0,
        at_most=0.9999,
        fixed_in_run=True,
        group="recipe",
    )
    adam_epsilon: float = define(
        ADAM_EPSILON,
        "Number that Adam adds to the root of its average of squared gradients",
        at_least=1e-12,
        fixed_in_run=True,
        group="recipe",
    )
    label_smoothing: float = define(
        0.0, "Share of each label to spread over all classes", at_least=0, below=1, group="recipe"
    )
    mixup_alpha: float = define(
        0.0, "Mix pairs of images, with shares from Beta(alpha, alpha); 0 mixes none", at_least=0, group="recipe"
    )
    cutmix_alpha: float = define(
        0.0, "Paste pieces between images, shares from Beta(alpha, alpha); 0 pastes none", at_least=0, group="recipe"
    )
    ema_decay: float = define(
        0.0,
        "Decay per step of the moving average of the weights, which is tested and saved; 0 uses no average",
        at_least=0,
        below=1,
        fixed_in_run=True,
        group="recipe",
    )
    loss: str = define(
        "cross_entropy",
        "Training loss: cross_entropy, or for multi-label also focal or asymmetric, which give easy examples "
        "less weight",
        group="recipe",
    )
    gradient_accumulation_steps: int = define(
        1, "Number of batches whose gradients make one training step", at_least=1, fixed_in_run=True, group="recipe"
    )
    augmentation_strength: str = define(
        "default",
        "Strength of the random augmentation; photo leaves moving and scaling to random_crop_area",
        choices=("none", "light", "default", "strong", "photo"),
        group="recipe",
    )
    random_crop_area: list[float] = define(
        [1.0, 1.0],
        "Smallest and largest share of an image's area in a random training crop; 1 1 crops nothing",
        above=0,
        at_most=1,
        check=range_fault,
        excludes=Exclusion(
            [1.0, 1.0],
            "image_cache",
            ("none",),
            "expected 1 1 unless image_cache is none: random crops need the original images",
        ),
        group="recipe",
    )
    model_selection: str = define(
        "best_epoch",
        "Model to keep: best epoch, last epoch, or the best weighted average of the starting and last "
        "weights (interpolate)",
        choices=("best_epoch", "last_epoch", "interpolate"),
        fixed_in_run=True,
        group="recipe",
    )
    test_time_augmentation: str = define(
        "none",
        "Average over an image and its mirror image (flip) in validation, tests and saved models; takes twice the time",
        choices=("none", "flip"),
        fixed_in_run=True,
        group="recipe",
    )
    min_steps: int = define(
        0,
        "Smallest number of training steps; num_epochs is raised to reach it, unless time_budget is set",
        at_least=0,
        fixed_in_run=True,
        group="training",
    )
    time_budget: str = define(
        "",
        "Time for training, such as 90s, 10m or 2h, to which num_epochs is adapted; empty trains for num_epochs",
        check=duration_fault,
        group="training",
    )
    verbose: bool = define(False, "Show the log messages of the libraries too", group="machine")
    find_learning_rate: bool = define(
        False, "Instead of training, try rising learning rates, plot the loss and suggest one", group="training"
    )
    overwrite: bool = define(False, "Remove the run that is in save_model_path and start a new one", group="common")
