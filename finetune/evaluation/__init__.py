"""Metrics, confidence intervals, decisions (temperature and thresholds) and Grad-CAM. Start with `evaluation.py`.

Everywhere here, labels `y_true` are int `(images,)`, class positions, or multi-label `(images, classes)` of zeros and
ones. Probabilities are `(images, classes)`, raw ones those of the model before the temperature, and `groups` come from
`number_groups`, or are None if the images are independent."""
