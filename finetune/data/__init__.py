"""Images and tables on disk: reading one image, CSV tables, folders, splitting, and the data check.

Start with `images.py` (one file to pixels) and `tables.py` (one CSV to paths and labels); `data_check.py` ties the
checks together.
"""
