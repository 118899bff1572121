"""Writes a trained network as one HTML file that runs it in a browser while one draws.

The file holds the parameters, and `page.js`, a second implementation of `seqmnist.networks` in
JavaScript. It needs no server and no network: a browser opens it from a disk. It computes in
float64, whatever `model.dtype` is.
"""

import base64
import json
import zlib
from collections.abc import Mapping
from importlib import resources

import numpy as np

from seqmnist.config import ModelConfig
from seqmnist.display import describe
from seqmnist.errors import UserError
from seqmnist.networks import cells, model, views
from seqmnist.spec import ImageSpec
from seqmnist.study import images

PAGE = "draw.html"
MAX_BYTES = 1_000_000  # of a page, if rounding can achieve it
_ALL_BITS = 24  # significant bits of a float32 number
_BITS = (_ALL_BITS, 20, 18, 17, 16)  # that matrices keep, tried in this order
_ORDERS = {
    "rows": "one row of the image, from top to bottom",
    "columns": "one column of the image, from left to right",
    "pixels": "one pixel, row after row",
    "permuted_pixels": "one pixel, in a random order that is always the same",
    "bit_reversed_pixels": "one pixel, in the order of its number with the bits reversed",
    "hilbert_pixels": "one pixel, along a Hilbert curve",
}


def make(config: ModelConfig, spec: ImageSpec, params: Mapping[str, np.ndarray]) -> str:
    """Returns the page of a network; `params` are those of the safetensors file, by name.

    If it would be larger than `MAX_BYTES`, matrices are rounded to fewer significant bits. Vectors
    are not: some are time scales, and a long sequence raises those to high powers.

    Raises UserError if a part of the network has no JavaScript.
    """
    _check(config)
    pixels = views.numbers_read(config, spec)
    if pixels is None:
        raise UserError(f"the view {config.view} has no JavaScript, which {PAGE} needs")
    about = {
        "cell": config.cell,
        "hidden_size": config.hidden_size,
        "readout": config.readout,
        "pixels": pixels.tolist(),
        "is_of_digits": images.is_of_digits(spec),
        "network": describe(config),
        "reads": _reads(config),
        "shapes": [[name, array.shape] for name, array in params.items()],
        **spec.to_dict(),
    }
    for bits in _BITS:
        rounded = [_round(x, bits) if x.ndim > 1 else x for x in params.values()]
        page = _fill({**about, "bits": bits, "packed": _pack(rounded)})
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


def _check(config):
    """Raises UserError unless `page.js` has the cell and the readout."""
    for table, name, what in (
        (cells.CELLS, config.cell, "cell"),
        (model.READOUTS, config.readout, "readout"),
    ):
        if table.is_own(name):
            raise UserError(f"the {what} {name} has no JavaScript, which {PAGE} needs")


def _reads(config):
    """Returns in words what a time step reads."""
    order = _ORDERS.get(config.view, "one square patch, row after row")
    if views.VIEWS.is_own(config.view):
        order = "some pixels"
    if config.reverse:
        order += "; this order is reversed"
    if config.subsample > 1:
        order += f"; only 1 of {config.subsample} steps is kept"
    return order


def _round(array, bits):
    """Rounds float32 numbers to a number of significant bits."""
    unit = 1 << (_ALL_BITS - bits)
    return ((array.view(np.uint32) + unit // 2) // unit * unit).view(np.float32)


def _pack(arrays):
    """Returns float32 arrays as text; `unpack` in page.js is its inverse."""
    numbers = np.concatenate([array.ravel() for array in arrays]).astype(">f4")
    planes = numbers.view(np.uint8).reshape(-1, 4).T  # bytes of a kind side by side compress better
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def _fill(about):
    data = json.dumps(about, ensure_ascii=False, separators=(",", ":"))
    page, script = (
        resources.files(__package__).joinpath(name).read_text("utf-8")
        for name in ("page.html", "page.js")
    )
    page = page.replace("{}</script>", data.replace("<", "\\u003c") + "</script>")
    return page.replace('<script src="page.js"></script>', f"<script>\n{script}</script>")
