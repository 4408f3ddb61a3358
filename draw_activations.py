"""Draws class activation maps (Grad-CAM) over every test image, into cam_output in the run's folder."""

from __future__ import annotations

import functools
import os

from configs import Configs
from finetune.core.scripts import run_script, script
from finetune.core.values import get_input_size


@script
def main(configs: Configs) -> dict:
    """Explains the test images and writes a picture of each; returns `paths` and `faithfulness`."""
    from finetune.core.devices import start_devices
    from finetune.core.files import check_folder
    from finetune.core.texts import show_progress
    from finetune.data.images import build_reader
    from finetune.evaluation import explaining
    from finetune.evaluation.decision import find_decision_folder, read_decision
    from finetune.evaluation.evaluation import Answers
    from finetune.evaluation.gradcam import GradCam
    from finetune.evaluation.novelty import find_reference
    from finetune.models.model_files import load_fitting_model
    from finetune.predicting.prediction_files import describe_decision
    from finetune.reporting.cam_pictures import draw_all, draw_batch, name_outputs, overlay_heatmap, write_page
    from finetune.training.run_folder import MAPS_FOLDER
    from finetune.training.trained_model import find_trained_model, name_model
    from generator import get_generator, naming_bad_images, tell_bad_images

    start_devices(configs.gpu_percentage)
    model_path, configs = find_trained_model(configs, ("test_csv", "image_directory", "csv_label_column"))
    folder = check_folder(os.path.join(configs.save_model_path, MAPS_FOLDER), "save_model_path")
    decisions = find_decision_folder(model_path, configs.save_model_path)
    decision = read_decision(decisions, configs.classes, configs.multi_label_classification, model_path)
    sequence = get_generator(configs.test_csv, configs.classes, configs, training=False)
    model = load_fitting_model(model_path, configs.classes, get_input_size(configs))
    print(name_model(configs, model_path), describe_decision(decision, "exact_match"), sep="\n")
    reference = find_reference(decisions, model_path, True) if decision.calls_unknown else None
    paths = [os.path.join(folder, name) for name in name_outputs(sequence.paths)]
    choose = functools.partial(explaining.CHOOSERS[configs.cam_classes], decision=decision, top_k=configs.cam_top_k)
    grad_cam = GradCam(model, configs.cam_method, configs.cam_backbone_layer)
    explainer = explaining.Explainer(grad_cam, decision, choose, reference)
    shape = {"image_size": get_input_size(configs), "resize_mode": configs.resize_mode}
    overlay = functools.partial(overlay_heatmap, opacity=configs.cam_alpha, colormap=configs.cam_colormap, **shape)
    facts = {"files": list(zip(sequence.paths, paths, strict=True)), "class_names": configs.classes, "overlay": overlay}
    draw = functools.partial(draw_batch, **facts, longest_side=configs.cam_picture_size, read=build_reader(configs))
    explained, found, seed = explainer.explain(sequence), [], configs.random_seed or 0
    removal = explaining.choose_removal_on(explainer, sequence, seed)
    with show_progress(len(paths), configs.cam_method) as progress, naming_bad_images(sequence):
        batches = explaining.measure_some(explained, len(paths), explainer.predict, removal, seed, found)
        probabilities, similarities = draw_all(batches, draw, progress.update)
    tell_bad_images(sequence)
    paths = [path for row, path in enumerate(paths) if row not in sequence.bad_images]
    faithfulness = explaining.summarise_some(found, sequence, removal)
    summary = explaining.describe_faithfulness(faithfulness, len(paths))
    answers = Answers(sequence.get_read_paths(), sequence.get_y_true(), probabilities, decision, similarities)
    page = write_page(folder, paths, answers, model_path, summary)
    print(f"Wrote {len(paths)} pictures to {folder}\n{summary}\nThe page with all of them is {page}")
    return {"paths": paths, "faithfulness": faithfulness}


if __name__ == "__main__":
    run_script(main)
