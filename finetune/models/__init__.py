"""What a model is made of: backbones, heads, losses, optimizers, and the files that models are kept in.

Start with `backbones.py` and `heads.py`, the registries; `model.py` in the root joins them to a model.
"""
