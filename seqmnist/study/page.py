"""Writes a trained network as one HTML file that runs it in a browser while one draws.

The file holds the parameters, and `page.js`, a second implementation of `seqmnist.networks` in
JavaScript. It needs no server and no network: a browser opens it from a disk.
"""

import base64
import json
import pathlib
import zlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np

from seqmnist.config import ModelConfig
from seqmnist.display import describe
from seqmnist.errors import UserError, explain_storage
from seqmnist.networks import cells, gated, linear, model, views
from seqmnist.spec import ImageSpec
from seqmnist.study import images

PAGE = "draw.html"
MAX_BYTES = 1_000_000  # of a page with all bits of its parameters
_ORDERS = {
    "rows": "one row of the image, from top to bottom",
    "columns": "one column of the image, from left to right",
    "pixels": "one pixel, row after row",
    "permuted_pixels": "one pixel, in a random order that is always the same",
    "bit_reversed_pixels": "one pixel, in the order of its number with the bits reversed",
    "hilbert_pixels": "one pixel, along a Hilbert curve",
}


def write(
    path: pathlib.Path, config: ModelConfig, spec: ImageSpec, params: Mapping[str, np.ndarray]
) -> None:
    """Writes the page; `params` are those of the safetensors file, by name.

    Raises UserError if a part of the network has no JavaScript; then there is no file, not even an
    earlier one.
    """
    path.unlink(missing_ok=True)
    with explain_storage(str(path), "make room or make it writable, then export again"):
        aside = path.with_name(f"{path.name}.partial")
        aside.write_text(make(config, spec, params), encoding="utf-8")
        aside.replace(path)


def make(config: ModelConfig, spec: ImageSpec, params: Mapping[str, np.ndarray]) -> str:
    """Returns the page; arguments and errors as `write`.

    If it would be larger than `MAX_BYTES`, matrices are rounded to 16 significant bits: their bytes
    hardly compress otherwise. Other parameters, such as time scales, which a long sequence raises
    to a high power, keep all bits.
    """
    about = {
        "cell": config.cell,
        "hidden_size": config.hidden_size,
        "readout": config.readout,
        "pixels": _pixels(config, spec).tolist(),
        "is_of_digits": images.is_of_digits(spec),
        "network": describe(config),
        "reads": _reads(config),
        "parameters": sum(array.size for array in params.values()),
        "is_rounded": False,
        "shapes": [[name, array.shape] for name, array in params.items()],
        **spec.to_dict(),
    }
    _check(config)
    page = _fill(about, params)
    if len(page.encode()) > MAX_BYTES:
        rounded = {name: _round(x) if x.ndim > 1 else x for name, x in params.items()}
        page = _fill(about | {"is_rounded": True}, rounded)
    return page


def _check(config):
    """Raises UserError unless `page.js` has the cell and the readout."""
    for table, name, what, modules in (
        (cells.CELLS, config.cell, "cell", (gated, linear)),
        (model.READOUTS, config.readout, "readout", (model,)),
    ):
        if table[name].__module__ not in [module.__name__ for module in modules]:
            raise UserError(f"the {what} {name} has no JavaScript, which {PAGE} needs")


def _pixels(config, spec):
    """Returns which numbers of the flat image each time step reads, int [T, F].

    Raises UserError if the view does more than choose numbers.
    """
    def read(numbers):
        numbers = numbers.reshape(1, *spec.shape)
        return np.asarray(views.sequence(config, numbers))[0] * 255

    count = int(np.prod(spec.shape))
    pixels = np.rint(read(np.arange(count))).astype(int)
    other = np.random.default_rng(0).integers(0, 256, count)
    if pixels.min() < 0 or pixels.max() >= count or abs(other[pixels] - read(other)).max() > 0.01:
        raise UserError(f"the view {config.view} has no JavaScript, which {PAGE} needs")
    return pixels


def _reads(config):
    """Returns in words what a time step reads."""
    order = _ORDERS.get(config.view)
    if config.view.startswith("patches"):
        order = "one square patch, row after row"
    order = order or "some pixels"
    if config.reverse:
        order += ", all this in reverse"
    if config.subsample > 1:
        order += f"; only 1 of {config.subsample} steps is taken"
    return order


def _round(array):
    """Rounds float32 numbers to 16 significant bits."""
    words = np.asarray(array, np.float32).view(np.uint32)
    return ((words + 0x80) & 0xFFFFFF00).view(np.float32)


def _fill(about: dict[str, Any], params):
    numbers = np.concatenate([x.ravel() for x in params.values()]).astype(">f4")
    planes = numbers.view(np.uint8).reshape(-1, 4).T  # bytes that are alike, side by side
    packed = base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()
    data = json.dumps(about | {"packed": packed}, ensure_ascii=False, separators=(",", ":"))
    page, script = (
        resources.files(__package__).joinpath(name).read_text("utf-8")
        for name in ("page.html", "page.js")
    )
    page = page.replace("{}</script>", data.replace("<", "\\u003c") + "</script>")
    return page.replace('<script src="page.js"></script>', f"<script>\n{script}</script>")
