"""NumPy files of arrays, as Keras publishes MNIST: x_train, y_train, x_test, y_test."""

import pathlib
import zipfile

import numpy as np

from seqmnist.datasets import pictures
from seqmnist.datasets.archives import Splits
from seqmnist.errors import UserError, explain_any

_NAMES = ("x_train", "y_train", "x_test", "y_test")


def read(path: pathlib.Path) -> Splits:
    """Reads a .npz file, or the only one in a folder.

    Images are [N, H, W], or [N, H, W, channels], bytes or numbers in 0 to 1 or 0 to 255; labels are
    [N] or [N, 1]. Raises UserError if there is no such file, or it holds something else.
    """
    if path.is_dir():
        files = sorted(each for each in path.glob("*.npz") if each.is_file())
        if len(files) != 1:
            there = ", ".join(each.name for each in files[:5]) or "none"
            raise UserError(
                f"config.data.manual_dir={path} must be a .npz file, or hold one; found {there}"
            )
        (path,) = files
    if not path.is_file():
        fault = "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"config.data.manual_dir={path} {fault}; name a .npz file")
    remedy = "make it readable, or save it again without pickle"
    with explain_any(f"{path} cannot be read", remedy), path.open("rb") as raw:
        if not zipfile.is_zipfile(raw):  # of a path, it takes an error of the disk for False
            raise UserError(
                f"{path} is damaged, or not a .npz file; save the arrays {', '.join(_NAMES)} with "
                "numpy.savez"
            )
        raw.seek(0)
        with np.load(raw, allow_pickle=False) as file:
            if missing := [name for name in _NAMES if name not in file]:
                raise UserError(
                    f"{path} holds no {', '.join(missing)}; found {', '.join(file) or 'nothing'}; "
                    f"save it with the names {', '.join(_NAMES)}"
                )
            arrays = {name: file[name] for name in _NAMES}

    def images(name):
        if (array := arrays[name]).dtype.kind not in "buif":
            raise UserError(f"{path} holds {array.dtype} as {name}; numbers are needed")
        return pictures.to_bytes(array, path)

    def labels(name):
        array = arrays[name]
        if array.dtype.kind not in "iu" or array.ndim > 2 or array.shape[1:] not in ((), (1,)):
            raise UserError(
                f"{path} holds {array.dtype} {list(array.shape)} as {name}; one whole number for "
                "each image is needed: see numpy.argmax for one-hot labels, and numpy.unique with "
                "return_inverse for others"
            )
        return array.reshape(-1)

    return Splits((images("x_train"), labels("y_train")), (images("x_test"), labels("y_test")))
