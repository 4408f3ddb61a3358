"""Studies of backbones and labels without training: comparisons and suspected label errors.

Start with `backbone_comparison.py` or `label_errors.py`.
"""
