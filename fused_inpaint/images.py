# SPDX-License-Identifier: Apache-2.0
"""Photo and mask files to tensors and back, such that known pixels keep their exact stored values."""

from __future__ import annotations

import os
import struct
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_MEGAPIXELS = 80
LOSSLESS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
GREY_NOTE, GREY_LIMIT = 0.001, 0.10  # share of neither-black-nor-white mask pixels that is mentioned, and refused
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
# What Pillow raises on a file that it cannot read.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    MemoryError,
    OverflowError,
    KeyError,
    struct.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """A photo, mask or output path that cannot be used; the text is one sentence for the user."""


@dataclass(frozen=True)
class Photo:
    """An image as stored, upright.

    pixels: uint8 or uint16, (H, W) grey, (H, W, 2) grey and alpha, (H, W, 3 or 4) colour.
    """

    pixels: np.ndarray
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def colours(self) -> int:
        channels = 1 if self.pixels.ndim == 2 else self.pixels.shape[2]
        return 1 if channels < 3 else 3

    @property
    def white(self) -> int:
        return int(np.iinfo(self.pixels.dtype).max)

    def tensor(self) -> Tensor:  # -> (1, 3, H, W) float32 in [0, 1]
        planes = self.pixels.reshape(*self.size, -1)[..., : self.colours].astype(np.float32) / self.white
        return torch.from_numpy(planes).permute(2, 0, 1).expand(3, -1, -1)[None].contiguous()

    def enlarged(self, factor: int) -> Photo:
        """Each pixel `factor` x `factor` times."""
        return replace(self, pixels=self.pixels.repeat(factor, 0).repeat(factor, 1))

    def filled(self, result: Tensor, known: Tensor) -> Photo:  # (1, 3, H, W), (1, 1, H, W)
        """The photo with the colours of `result` in its holes; known pixels and alpha keep their stored values."""
        colours = result[0].clamp(0, 1).double()
        if self.colours == 1:
            colours = colours.mean(0, keepdim=True)
        stored = (colours * self.white).round().permute(1, 2, 0).numpy().astype(self.pixels.dtype)
        pixels = self.pixels.copy()
        view = pixels.reshape(*self.size, -1)
        hole = known[0, 0].numpy() <= 0
        view[hole, : self.colours] = stored[hole]
        return replace(self, pixels=pixels)


def spread(image: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The pixels of a small image at their places in one `factor` times as large, and the mask of these places: a
    network for inpainting then fills in what is between them (Liu et al. 2018, section 5.2).

    Pixel (x, y) goes to (K x + K // 2, K y + K // 2), K = factor.

    Args:
        image: (N, C, H, W).
        factor: K, from 1 on.

    Returns:
        (image (N, C, K H, K W) with 0 in the holes, mask (1, 1, K H, K W) with 1 = valid), both of the image's dtype.

    Raises:
        ValueError: an image of other dimensions, or a factor below 1.

    >>> import torch
    >>> image, mask = spread(torch.tensor([[[[0.25, 0.5]]]]), 2)
    >>> image.tolist()
    [[[[0.0, 0.0, 0.0, 0.0], [0.0, 0.25, 0.0, 0.5]]]]
    >>> mask.tolist()
    [[[[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]]]]
    """
    if image.dim() != 4:
        raise ValueError(f"spread: image must be (N, C, H, W), got {tuple(image.shape)}")
    if factor < 1:
        raise ValueError(f"spread: factor must be 1 or more, got {factor}")
    n, c, high, wide = image.shape
    large = image.new_zeros(n, c, factor * high, factor * wide)
    mask = image.new_zeros(1, 1, factor * high, factor * wide)
    places = (..., slice(factor // 2, None, factor), slice(factor // 2, None, factor))
    large[places], mask[places] = image, 1
    return large, mask


def read_photo(path: str | os.PathLike[str]) -> Photo:
    """An RGB, RGBA, grey (with or without alpha), palette, black-and-white or 16-bit grey file, turned upright."""
    image = _open(path, "photo")
    dpi = image.info.get("dpi")
    return Photo(_pixels(image, path, "photo"), image.info.get("icc_profile"), dpi if _is_dpi(dpi) else None)


def read_mask(path: str | os.PathLike[str], size: tuple[int, int] | None, hole: str = "white") -> tuple[Tensor, str]:
    """Known pixels (1, 1, H, W), 1 = known and 0 = hole, cut at half brightness; and a note for the user, or "".

    Transparent parts of a mask count as known. `size` is the photo's (None: any).
    """
    is_hole, note = read_sharp_hole(path, size, hole)
    other = "black" if hole == "white" else "white"
    if not is_hole.any():
        raise ImageError(f"mask must mark some hole in {hole}, got none (holes in {other}: --hole {other})")
    if is_hole.all():
        raise ImageError(f"mask must leave some known pixels, got only {hole}, which marks holes")
    return known_outside(is_hole), note


def known_outside(is_hole: np.ndarray) -> Tensor:  # (H, W) bool -> (1, 1, H, W) float32: 1 = known, 0 = hole
    return torch.from_numpy(1 - is_hole.astype(np.float32))[None, None]


def read_sharp_hole(
    path: str | os.PathLike[str], size: tuple[int, int] | None, hole: str = "white"
) -> tuple[np.ndarray, str]:
    """(H, W) bool, True in the holes, of a mask file of the photo's `size` (None: any) that is black and white; and a
    note for the user, or ""."""
    is_hole, grey = read_hole(path, hole)
    if size not in (None, is_hole.shape):
        expected = f"{_wide_high(size)} pixels (width x height) like the photo"
        raise ImageError(f"mask must be {expected}, got {_wide_high(is_hole.shape)}")
    if grey > GREY_LIMIT:
        raise ImageError(f"mask must be black and white, got {100 * grey:.0f} % grey pixels")
    return is_hole, f"{100 * grey:.1f} % of the mask is grey; it is cut at half" if grey > GREY_NOTE else ""


def read_hole(path: str | os.PathLike[str], hole: str = "white") -> tuple[np.ndarray, float]:
    """(H, W) bool, True in the holes of a mask file, cut at half brightness; and the share of grey pixels.

    Transparent parts count as known. A file of nothing but 0 and 1 is read as black and white.
    """
    if hole not in ("white", "black"):
        raise ImageError(f"hole must be white or black, got {hole}")
    mask = Photo(_pixels(_open(path, "mask"), path, "mask"))
    planes = mask.pixels.reshape(*mask.size, -1).astype(np.float32)
    colours = planes[..., : mask.colours]
    brightness = colours.mean(-1) / (1 if colours.max() == 1 else mask.white)
    if planes.shape[-1] in (2, 4):
        alpha = planes[..., -1] / mask.white
        brightness = brightness * alpha + (0.0 if hole == "white" else 1.0) * (1 - alpha)
    grey = float(((brightness > 0.1) & (brightness < 0.9)).mean())
    return brightness > 0.5 if hole == "white" else brightness <= 0.5, grey


def pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a folder that Pillow may read, by name."""
    known = Image.registered_extensions()
    return sorted(path for path in Path(folder).iterdir() if path.is_file() and path.suffix.lower() in known)


def check_output(path: str | os.PathLike[str], inputs: tuple[str | os.PathLike[str], ...] = ()) -> None:
    """ImageError if a lossless picture cannot be written to `path`; leaves nothing behind."""
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in LOSSLESS:
        raise ImageError(
            f"output must end in {', '.join(LOSSLESS)}, which keep known pixels exactly, "
            f"got {target.name}; try {target.with_suffix('.png').name}"
        )
    folder = target.resolve().parent
    if not folder.is_dir():
        raise ImageError(f"output must be in an existing folder, got {target}")
    if target.is_dir():
        raise ImageError(f"output must be a file, got the folder {target}")
    if any(target.resolve() == Path(source).resolve() for source in inputs):
        raise ImageError(f"output must be another file than the inputs, got {target}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="."):
            pass
    except OSError as error:
        raise ImageError(f"output must be in a writable folder, got {folder} ({error.strerror})") from None


def write_photo(photo: Photo, path: str | os.PathLike[str]) -> None:
    """Write to a temporary file beside `path`, then rename: `path` is the old file or the whole new one, never half."""
    target = Path(path).resolve()
    image = Image.fromarray(photo.pixels)
    extra: dict[str, Any] = {"icc_profile": photo.icc, "dpi": photo.dpi}
    extra = {key: value for key, value in extra.items() if value is not None}
    if LOSSLESS[target.suffix.lower()] == "TIFF":
        extra["compression"] = "tiff_adobe_deflate"
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, LOSSLESS[target.suffix.lower()], **extra)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise ImageError(f"output must be writable, got {path} ({error.strerror or error})") from None
    finally:
        # Gone already after the rename; still there after an error or Ctrl-C.
        Path(temporary).unlink(missing_ok=True)


def _open(path: str | os.PathLike[str], role: str) -> Image.Image:
    if not Path(path).is_file():
        raise ImageError(f"{role} must be an existing file, got {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            with Image.open(path) as image:
                if image.width * image.height > MAX_MEGAPIXELS * 1e6:
                    raise Image.DecompressionBombError
                _refuse_lossy_modes(image, path, role)
                image.load()
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise ImageError(f"{role} must have at most {MAX_MEGAPIXELS} megapixels, got more in {path}") from None
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{role} must be an image file, got {path}, which is none that Pillow knows") from None
    except UNREADABLE as error:
        raise ImageError(f"{role} must be a whole, readable image file, got {path} ({error})") from None


def _refuse_lossy_modes(image: Image.Image, path: str | os.PathLike[str], role: str) -> None:
    """Pillow reads 16-bit colour as 8-bit; known pixels would change without a word."""
    deep = False
    if image.format == "PNG":
        with open(path, "rb") as file:
            header = file.read(26)
        deep = header[24] == 16 and header[25] in (2, 4, 6)
    elif image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, (8,))
        deep = len(bits) > 1 and max(bits) > 8
    if deep and role == "photo":
        raise ImageError(f"photo must have 8 bits a colour, or 16-bit grey, got 16-bit colour in {path}")


def _pixels(image: Image.Image, path: str | os.PathLike[str], role: str) -> np.ndarray:
    transparent = "transparency" in image.info
    if image.mode in _SIXTEEN_BIT:
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() >= 0 and values.max() <= 65535:
            return values.astype(np.uint16)
    target = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "P": "RGB", "PA": "RGBA"}.get(image.mode)
    if target is None:
        raise ImageError(f"{role} must be RGB, RGBA, grey, palette or 16-bit grey, got mode {image.mode} in {path}")
    if transparent:
        target = {"L": "LA", "RGB": "RGBA"}.get(target, target)
    return np.asarray(image if image.mode == target else image.convert(target))


def _wide_high(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _is_dpi(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(float(part) > 0 for part in value)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
