"""Cuts the demo's patches from photographs that scikit-image ships; run from the project's folder to make them again.

The left half of each photograph gives the training patches, the right half the test patches: no pixel is in both.
"""

import os

import cv2
import numpy as np
import pandas as pd
import skimage.data

PATCH = 96
PATCHES = {"training": 60, "testing": 20}

rng = np.random.default_rng(0)
rows = []
for texture in ("brick", "grass", "gravel"):
    photo = getattr(skimage.data, texture)()
    os.makedirs(f"data/images/{texture}", exist_ok=True)
    half = photo.shape[1] // 2
    for split, left in (("training", 0), ("testing", half)):
        for number in range(PATCHES[split]):
            y, x = rng.integers(0, photo.shape[0] - PATCH + 1), left + rng.integers(0, half - PATCH + 1)
            path = f"data/images/{texture}/{split}_{number:02d}.jpg"
            cv2.imwrite(path, photo[y : y + PATCH, x : x + PATCH], [cv2.IMWRITE_JPEG_QUALITY, 90])
            rows.append((path, texture, split))
table = pd.DataFrame(rows, columns=["path", "class", "split"]).sort_values("path")
table[["path", "class"]].to_csv("data/all_data.csv", index=False)
for split in PATCHES:
    table.loc[table["split"] == split, ["path", "class"]].to_csv(f"data/{split}_set.csv", index=False)
