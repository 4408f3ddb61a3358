"""From image files to answers, in every runtime: Keras, LiteRT, ONNX and SavedModel.

Start with `predicting.py`, which loads a model of any format.
"""
