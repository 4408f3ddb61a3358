"""The public functions for a user's own code, re-exported from their modules."""

from finetune.core.devices import set_gpu_usage
from finetune.data.images import read_image
from finetune.evaluation.decision import read_decision
from finetune.evaluation.metrics import get_evaluation_metrics, get_multilabel_evaluation_metrics
from finetune.models.compiling import get_class_weights, get_multilabel_class_weights, get_optimizer
from finetune.models.compressed import custom_load_model, custom_save_model
from finetune.models.model_files import load_model
from finetune.predicting.predicting import classify_image, load_exported_model
from generator import get_generator

__all__ = [
    "classify_image",
    "custom_load_model",
    "custom_save_model",
    "get_class_weights",
    "get_evaluation_metrics",
    "get_generator",
    "get_multilabel_class_weights",
    "get_multilabel_evaluation_metrics",
    "get_optimizer",
    "load_exported_model",
    "load_model",
    "read_decision",
    "read_image",
    "set_gpu_usage",
]
