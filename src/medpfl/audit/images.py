"""Truth and reconstruction on disk: an 8-bit PNG to look at and a float32 `.npz` beside it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from medpfl.audit.files import write_atomically


def write_image(path: Path, image: Tensor) -> None:
    """Writes (C, H, W) in [0, 1], C 1 or 3, as `path` (PNG) and beside it as `.npz` with the key `image`.

    Images with other than two spatial dimensions are shown by the middle slice of each leading one.
    """
    array = image.detach().float().cpu().numpy()
    packed = io.BytesIO()
    np.savez_compressed(packed, image=array)
    shown = array
    while shown.ndim > 3:
        shown = shown[:, shown.shape[1] // 2]
    pixels = np.round(shown.clip(0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[0]) if pixels.shape[0] == 1 else Image.fromarray(pixels.transpose(1, 2, 0))
    png = io.BytesIO()
    picture.save(png, format="PNG")
    write_atomically(path, png.getvalue())
    write_atomically(path.with_suffix(".npz"), packed.getvalue())
