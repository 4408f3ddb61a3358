"""How good a model is and why it answers as it does: metrics, intervals, decisions and Grad-CAM.

Start with `evaluation.py`. A decision is the temperature and the thresholds that turn probabilities into answers.
"""
