# SPDX-License-Identifier: Apache-2.0
"""The photographs that come with scikit-image and scikit-learn, to train small networks on: nothing is downloaded."""

from pathlib import Path

import numpy as np
from PIL import Image

HELD_OUT = ("chelsea", "coffee", "china")
TRAINING = (
    *("astronaut", "rocket", "motorcycle", "flower", "camera", "coins", "brick", "grass", "gravel", "moon"),
    *("hubble_deep_field", "immunohistochemistry", "retina"),
)
SHORTER = 192  # pixels, of a photograph as it is written: reading it is most of a small network's step


def write_photos(folder: Path) -> None:
    """training/ and held_out/, a file each; photographs of a package that is not installed are left out."""
    import skimage.data

    named: dict[str, np.ndarray] = {}
    for name in (*TRAINING, *HELD_OUT):
        if name == "motorcycle":
            named[name] = skimage.data.stereo_motorcycle()[0]
        elif hasattr(skimage.data, name):
            named[name] = getattr(skimage.data, name)()
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        print("china and flower are left out, scikit-learn is not installed")
    else:
        named |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for name, pixels in named.items():
        path = folder / ("held_out" if name in HELD_OUT else "training") / f"{name}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = Image.fromarray(pixels)
        factor = SHORTER / min(photo.size)
        photo.resize((round(factor * photo.width), round(factor * photo.height)), Image.Resampling.LANCZOS).save(path)
