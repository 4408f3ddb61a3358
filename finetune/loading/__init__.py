"""From a row of a table to a batch of pixels: augmentation, caches, batches and worker processes.

Start with `batches.py`. `generator.py` in the root puts it together as a Keras sequence.
"""
