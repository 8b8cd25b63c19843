# SPDX-License-Identifier: Apache-2.0
"""Train a network on a folder of photos from Python, then fill a hole with it.

    python examples/own_photos.py photos/ --out run --steps 20000 --size 256 --width 64 --levels 7

Without a folder it makes a few toy pictures. The same on the command line: `fused-inpaint train pconv --data photos/
--out run`. A stopped run goes on when it is started again with the same `--out`.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fused_inpaint.images import Photo, read_photo, write_photo
from fused_inpaint.masks import random_mask
from fused_inpaint.models import load_published
from fused_inpaint.training.loop import Options, Trainer
from fused_inpaint.training.photos import MadeMasks, Photos
from fused_inpaint.training.recipes import recipe_of


def toy_photos(folder: Path, count: int = 6, side: int = 96) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="?", help="a folder, subfolders included (toy pictures)")
    parser.add_argument("--out", default="own_photos_run")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=64, help="side of the training squares in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--vgg", help="torchvision's VGG-16 weights; without, no perceptual and no style loss")
    arguments = parser.parse_args(argv)

    out = Path(arguments.out)
    with tempfile.TemporaryDirectory() as toys:
        folder = Path(arguments.photos or toys)
        if not arguments.photos:
            toy_photos(folder)
        # What the paper says, with the fields that a small machine needs otherwise.
        recipe = recipe_of(
            "pconv",
            size=arguments.size,
            batch=arguments.batch,
            model={"levels": arguments.levels, "width": arguments.width},
        )
        photos = Photos(folder, recipe.size, MadeMasks("pconv"), 0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = Options(arguments.steps, recipe.batch, device=device, vgg=arguments.vgg, log_every=10)
        trainer = Trainer(recipe, photos, out, options)
        trainer.run(lambda fraction, text: print(f"{100 * fraction:3.0f} %  {text}"))
        photo = read_photo(photos.files[0])

    model = load_published("pconv", out / "model.safetensors")
    image = photo.tensor()  # (1, 3, H, W)
    mask = random_mask("pconv", photo.size, 1)[None, None].float()  # (1, 1, H, W), 1 = valid
    restored = model.inpaint(image, mask)
    assert torch.equal(restored[mask.expand_as(image) == 1], image[mask.expand_as(image) == 1])
    filled = photo.filled(restored, mask)
    write_photo(filled, out / "restored.png")
    holes = torch.where(mask.bool(), image, 1).mul(255).round().byte()[0].permute(1, 2, 0).numpy()
    write_photo(Photo(holes), out / "holes.png")
    print(f"{out / 'model.safetensors'}, {out / 'holes.png'} and {out / 'restored.png'}")


if __name__ == "__main__":
    main()
