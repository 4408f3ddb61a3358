"""The inside of the scripts: ten subpackages, each importing only from those before it.

core, data, loading, models, evaluation, training, predicting, exporting, reporting, studies. What a user runs and
edits is in the root.
"""
