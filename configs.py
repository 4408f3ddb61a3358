"""Every option of the collection: its name, type, default, meaning and bounds.

Edit a default below, or override it without editing: `--configs FILE.json` beats the default, and a command-line
flag beats both. The one line that declares an option is also its type check, its `--help` entry and its flag.
"""

from __future__ import annotations

import dataclasses

from finetune.core.options import Exclusion, Options, define
from finetune.core.values import (
    classes_fault,
    crop_area_fault,
    duration_fault,
    eval_image_size_fault,
    folder_fault,
    image_size_fault,
    layer_sizes_fault,
    pixel_range_fault,
    threshold_range_fault,
)

# Keras's own; the paper and PyTorch have an epsilon of 1e-8.
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

    train_csv: str = define("./data/training_set.csv", "The training images and their labels", group="common")
    test_csv: str = define(
        "./data/testing_set.csv", "The images that training never learns from, for test.py", group="common"
    )
    image_directory: str = define("", "Put in front of the paths in the CSV files", group="data")
    visual_model_name: str = define(
        "DenseNet121", "The backbone: a name listed in docs/options.md", describes_model=True, group="common"
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
    resize_mode: str = define(
        "stretch",
        "How an image of another shape comes to image_target_size: stretched, the largest part of that shape from its "
        "middle (crop), or whole on grey (pad)",
        choices=RESIZE_MODES,
        describes_model=True,
        group="data",
    )
    num_epochs: int = define(100, "Epochs in total, those before a resume included", at_least=1, group="common")
    csv_label_column: str = define("class", "The CSV column with the labels", group="data")
    classes: list[str] | None = define(
        None,
        "The class names; none finds them in train_csv, sorted",
        describes_model=True,
        check=classes_fault,
        group="data",
    )
    multi_label_classification: bool = define(
        False,
        "Several labels an image, written class1$class2",
        describes_model=True,
        group="common",
    )
    classifier_layer_sizes: list[float] = define(
        [0.4],
        "Layers before the output: 1 or more is a hidden layer of that size, less than 1 a dropout rate",
        at_least=0,
        at_most=2**20,
        describes_model=True,
        check=layer_sizes_fault,
        group="model",
    )
    head: str = define("dense", "The head: a name in finetune/models/heads.py", describes_model=True, group="model")
    conv_layers_to_train: int = define(
        -1,
        "Convolutions of the backbone to train: -1 all, 0 none, n the last n and what follows them",
        at_least=-1,
        fixed_in_run=True,
        group="model",
    )
    use_imagenet_weights: bool = define(
        True, "Start the backbone from its ImageNet weights, not from random ones", group="model"
    )
    pop_conv_layers: int = define(
        0,
        "Layers dropped from the end of the backbone, before the pooling",
        at_least=0,
        describes_model=True,
        group="model",
    )
    final_layer_pooling: str | None = define(
        "avg",
        "Pooling of the backbone's output; none flattens it",
        choices=("avg", "max"),
        describes_model=True,
        group="model",
    )
    load_model_path: str = define(
        "", "A model file, or the folder of a run, to continue from or to test", group="common"
    )
    save_model_path: str = define(
        "saved_model", "The folder that receives everything a run writes", check=folder_fault, group="common"
    )
    save_best_model_only: bool = define(True, "False also keeps the model of every epoch", group="training")
    learning_rate: float = define(1e-3, "The optimizer's learning rate", above=0, group="common")
    learning_rate_decay_factor: float = define(
        0.1,
        "The learning rate is multiplied by this on a plateau of the validation loss",
        above=0,
        below=1,
        group="training",
    )
    reduce_lr_patience: int = define(
        3, "Epochs without a lower validation loss that make a plateau", at_least=0, group="training"
    )
    minimum_learning_rate: float = define(
        1e-7, "The learning rate is never reduced below this", at_least=0, group="training"
    )
    optimizer_type: str = define(
        "Adam",
        "The optimizer: Adam, Adamax, Nadam, AdamW, SGD, RMSprop, Adagrad, Adadelta or Lion",
        fixed_in_run=True,
        group="training",
    )
    gpu_percentage: float = define(
        0.95,
        "Share of each visible GPU's memory to use; 0 runs on the CPU",
        at_least=0,
        at_most=1,
        group="machine",
    )
    batch_size: int = define(16, "Images a training step", at_least=1, fixed_in_run=True, group="common")
    multilabel_threshold_range: list[float] = define(
        [0.01, 0.99],
        "Lowest and highest threshold tried, in steps of 0.01",
        above=0,
        below=1,
        check=threshold_range_fault,
        group="explaining",
    )
    report_by: str = define(
        "", "test.py: a column of test_csv, such as site or camera; each value gets its own line", group="explaining"
    )
    generator_workers: int = define(
        4, "Threads that read and augment images, above 4 processes; 0 counts as 1", at_least=0, group="speed"
    )
    generator_queue_length: int = define(12, "Batches kept ready for the model", at_least=1, group="speed")
    show_model_summary: bool = define(True, "Print the model's layers before training", group="model")
    positive_weights_multiply: float = define(
        1.0,
        "Multi-label: multiplies the loss of the labels that are present",
        above=0,
        fixed_in_run=True,
        group="training",
    )
    use_class_balancing: bool = define(True, "Weigh rare classes more in the loss", fixed_in_run=True, group="training")
    cnn_downscaling_factor: int = define(
        0,
        "Trained convolutions that halve the image this many times before the backbone",
        at_least=0,
        at_most=14,
        describes_model=True,
        group="model",
    )
    cnn_downscaling_filters: int = define(
        64,
        "Filters of each downscaling convolution",
        at_least=1,
        at_most=2**16,
        describes_model=True,
        group="model",
    )
    validation_csv: str = define(
        "", "The images that select the best model; empty uses test_csv, and says so", group="common"
    )
    random_seed: int | None = define(
        0,
        "Seed of weights, order, augmentation and splits; none draws one",
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
        False, "Two runs give the same weights to the last bit; slower on a GPU", group="machine"
    )
    checkpoint_every_steps: int = define(
        0,
        "Also write latest_model.keras every that many steps; 0 only after each epoch",
        at_least=0,
        group="training",
    )
    early_stopping_patience: int = define(
        0,
        "Stop after that many epochs without a better validation figure; 0 never does",
        at_least=0,
        excludes=Exclusion(
            0,
            "model_selection",
            ("best_epoch",),
            "expected 0 where model_selection is not best_epoch: the schedule has to end",
        ),
        group="training",
    )
    mixed_precision: bool = define(
        False,
        "Compute in 16 bits where the GPU is faster so: bfloat16 where it has it, else float16 with loss scaling",
        describes_model=True,
        group="speed",
    )
    image_cache: str = define(
        "none",
        "Keep decoded, resized images after their first use: in memory, or in a file that later runs use too",
        choices=("none", "memory", "disk"),
        group="speed",
    )
    image_cache_path: str = define(
        "./data/image_cache",
        "The folder of the disk cache, and of features; may be deleted at any time",
        group="speed",
    )
    verify_data: str = define(
        "quick",
        "Check images and find near copies: about a minute (quick), completely (full), headers only, or nothing (off)",
        choices=VERIFY_MODES,
        group="data",
    )
    max_image_pixels: int = define(
        MAX_IMAGE_PIXELS,
        "Pixels that an image may have; its header tells before it is decoded",
        at_least=1,
        group="data",
    )
    pixel_range: list[float] = define(
        [],
        "Black and white of float and 32-bit TIFFs, or of floats, then integers; empty: the training set's range",
        describes_model=True,
        check=pixel_range_fault,
        group="data",
    )
    skip_bad_images: bool = define(
        False, "Leave out images that cannot be read, and say which, instead of stopping", group="data"
    )
    allow_duplicates: bool = define(False, "The same image in two sets is a warning, not an error", group="data")
    cam_method: str = define(
        "gradcam", "How draw_activations.py weighs the backbone's features", choices=CAM_METHODS, group="explaining"
    )
    cam_classes: str = define(
        "predicted",
        "Classes that draw_activations.py explains: the predicted one, those in the CSV (true), the cam_top_k most "
        "probable ones, or every label above its threshold",
        choices=CAM_CLASSES,
        group="explaining",
    )
    cam_top_k: int = define(3, "How many classes cam_classes top_k explains", at_least=1, group="explaining")
    cam_alpha: float = define(0.4, "Opacity of the heatmap over the image", at_least=0, at_most=1, group="explaining")
    cam_colormap: str = define("jet", "Colours of the heatmap", choices=CAM_COLORMAPS, group="explaining")
    cam_backbone_layer: str = define(
        "",
        "Spatial layer of the backbone whose features are weighed, by its name; empty: the last one",
        group="explaining",
    )
    cam_picture_size: int = define(
        640, "Longest side of a photo in draw_activations.py's pictures, in pixels", at_least=160, group="explaining"
    )
    distribution_strategy: str = define(
        "none",
        "Train on one device, on every visible GPU of this machine (mirrored), or on those of all hosts in TF_CONFIG "
        "or a Slurm step (multi_worker); batch_size is that of each GPU",
        choices=DISTRIBUTION_STRATEGIES,
        group="machine",
    )
    scale_learning_rate: bool = define(
        False, "Multiply the learning rate by the number of devices that train together", group="machine"
    )
    head_epochs: int = define(
        0,
        "Epochs that train the classifier alone, the backbone frozen, before all is trained",
        at_least=0,
        fixed_in_run=True,
        group="recipe",
    )
    fine_tune_learning_rate: float | None = define(
        None,
        "The learning rate after head_epochs; none keeps learning_rate",
        above=0,
        needs=("head_epochs", "head_epochs of 1 or more"),
        group="recipe",
    )
    head_initialization: str = define(
        "random",
        "Start the classifier from random weights, or from a logistic regression on the backbone's features of the "
        "training images (linear_probe)",
        choices=("random", "linear_probe"),
        group="recipe",
    )
    learning_rate_schedule: str = define(
        "plateau",
        "Reduce the learning rate on a plateau of the validation loss, along a cosine down to minimum_learning_rate in "
        "the last step, likewise after a rise in the first quarter of the steps (one_cycle), or not at all (constant)",
        choices=("plateau", "cosine", "one_cycle", "constant"),
        group="recipe",
    )
    warmup_epochs: float = define(
        0.0, "Epochs in which the learning rate rises from 0, at the start", at_least=0, group="recipe"
    )
    backbone_learning_rate_multiplier: float = define(
        1.0,
        "The backbone learns at the learning rate times this",
        above=0,
        at_most=100,
        group="recipe",
    )
    freeze_batch_norm: bool = define(
        False,
        "Leave the backbone's batch normalisation as its weights have it",
        fixed_in_run=True,
        group="recipe",
    )
    weight_decay: float = define(
        0.0,
        "Decoupled weight decay of kernels; biases and normalisations have none",
        at_least=0,
        below=1,
        fixed_in_run=True,
        group="recipe",
    )
    adam_beta_2: float = define(
        ADAM_BETA_2,
        "The decay of the squared gradients' average by whose root Adam divides a step: 0.99 forgets ten times as fast",
        at_least=0,
        at_most=0.9999,
        fixed_in_run=True,
        group="recipe",
    )
    adam_epsilon: float = define(
        ADAM_EPSILON,
        "What Adam adds to the root of that average: a weight whose gradients are usually smaller hardly moves",
        at_least=1e-12,
        fixed_in_run=True,
        group="recipe",
    )
    label_smoothing: float = define(
        0.0, "Share of each label that is spread over all classes", at_least=0, below=1, group="recipe"
    )
    mixup_alpha: float = define(
        0.0, "Mix pairs of images, with shares from Beta(alpha, alpha); 0 does not", at_least=0, group="recipe"
    )
    cutmix_alpha: float = define(
        0.0,
        "Paste a piece of one image into another, with shares from Beta(alpha, alpha); 0 does not",
        at_least=0,
        group="recipe",
    )
    ema_decay: float = define(
        0.0,
        "Test and keep the moving average of the weights with this decay a step; 0 keeps the weights",
        at_least=0,
        below=1,
        fixed_in_run=True,
        group="recipe",
    )
    loss: str = define(
        "cross_entropy",
        "The training loss; multi-label also focal or asymmetric, which look less at what is easy",
        group="recipe",
    )
    gradient_accumulation_steps: int = define(
        1,
        "Batches whose gradients make one training step: batch_size images at a time in memory",
        at_least=1,
        fixed_in_run=True,
        group="recipe",
    )
    augmentation_strength: str = define(
        "default",
        "How far training changes its images at random; photo leaves moving and scaling to random_crop_area",
        choices=("none", "light", "default", "strong", "photo"),
        group="recipe",
    )
    random_crop_area: list[float] = define(
        [1.0, 1.0],
        "Training shows a random part of each image, of an area between these shares of it and up to a third wider or "
        "higher than a square, in resize_mode crop than image_target_size, in pad, which pads the part, than the "
        "image; 1 1 shows all",
        above=0,
        at_most=1,
        check=crop_area_fault,
        excludes=Exclusion(
            [1.0, 1.0],
            "image_cache",
            ("none",),
            "crops are taken from the pictures themselves, which image_cache has not",
        ),
        group="recipe",
    )
    model_selection: str = define(
        "best_epoch",
        "Keep the model of the epoch with the best validation figure, that of the last epoch (last_epoch), or the "
        "start or an average of its and the last epoch's weights, of one label an image with a head fitted anew in "
        "part, where the validation images tell this to be better (interpolate)",
        choices=("best_epoch", "last_epoch", "interpolate"),
        fixed_in_run=True,
        group="recipe",
    )
    test_time_augmentation: str = define(
        "none",
        "Answer with the mean over an image and its mirror image (flip), in validation, tests and every file of the "
        "model; it takes twice the time",
        choices=("none", "flip"),
        fixed_in_run=True,
        group="recipe",
    )
    min_steps: int = define(
        0,
        "Raise num_epochs to as many as hold this number of training steps, a batch each: few images need more epochs; "
        "time_budget goes before it",
        at_least=0,
        fixed_in_run=True,
        group="training",
    )
    time_budget: str = define(
        "",
        "Fit num_epochs to this time, such as 90s, 10m or 2h, so that the schedule ends in it; empty takes num_epochs",
        check=duration_fault,
        group="training",
    )
    verbose: bool = define(False, "Show the libraries' own notices too", group="machine")
    find_learning_rate: bool = define(
        False,
        "Do not train: try rising learning rates, plot the loss over them and suggest one",
        group="training",
    )
    overwrite: bool = define(
        False, "Start a new run where save_model_path holds another one, and remove that", group="common"
    )
