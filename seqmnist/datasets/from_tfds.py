"""Image classification datasets that TFDS has prepared, read without TensorFlow."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shlex
from collections.abc import Iterator

import numpy as np

from seqmnist import errors
from seqmnist.datasets import archives
from seqmnist.errors import UserError

# TFDS's own pattern of names, without arguments of builders.
_NAME = re.compile(
    r"(?P<dataset>[a-zA-Z]\w*)(/(?P<config>[\w+\-.]+))?(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?"
)
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_INFO = "dataset_info.json"  # which TFDS writes when a version is complete
_FORMAT = "array_record"  # the only one that TFDS reads without TensorFlow or pyarrow
_CHUNK = 1000  # examples that are decoded at once
# What TFDS and its readers raise for damaged files; images that it cannot decode are None.
_ERRORS = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)
_OTHER_SOURCE = (
    "choose another dataset, or save its pictures in a folder as train/CLASS/* and test/CLASS/* "
    "and name that"
)


def found(data_dir: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns the folder of the newest prepared version of a dataset, or None.

    Args:
      data_dir: the folder in which TFDS prepares datasets.
      name: the dataset as TFDS spells it, e.g. "mnist", "mnist:3.*.*", "emnist/balanced:3.1.0".
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    wanted = (match["version"] or "*.*.*").split(".")
    folders = [
        folder
        for folder in _versions(data_dir / match["dataset"] / (match["config"] or ""), "*")
        if all(w in ("*", v) for w, v in zip(wanted, folder.name.split("."), strict=True))
    ]
    return max(
        folders, key=lambda folder: [int(part) for part in folder.name.split(".")], default=None
    )


def read(name: str, data_dir: pathlib.Path) -> archives.Splits:
    """Reads a prepared dataset, in the order of its records.

    Args:
      name: the dataset as TFDS spells it; see `found`.
      data_dir: the folder in which TFDS has prepared it.

    Returns:
      Per split images uint8 [N, H, W], or [N, H, W, 3] if colored, and labels int32 [N], which
      index the class names.

    Raises:
      UserError: the dataset is not there, needs TensorFlow to be read, is damaged, or holds no
        train and test splits, each of images of one size with one label each.
    """
    folder = found(data_dir, name)
    if folder is None:
        raise UserError(_not_found(name, data_dir))
    import tensorflow_datasets as tfds  # imported here: it takes a second

    with explain_damage(folder, "prepare it anew"):
        builder = tfds.builder_from_directory(folder)
        formats = {one.value for one in builder.info.available_file_formats()}
    if _FORMAT not in formats:
        folder_argument = shlex.quote(f"--dataset_version_dir={folder}")
        raise UserError(
            f"{folder} is stored as {' and '.join(sorted(formats))}, not {_FORMAT}; convert "
            "it where tensorflow, tensorflow-datasets, apache-beam and mlcroissant are installed: "
            f"tfds convert_format {folder_argument} --out_file_format={_FORMAT}"
        )
    image, label = _supervised_keys(folder, builder.info)
    skip = {key: tfds.decode.SkipDecoding() for key in builder.info.features}
    del skip[image], skip[label]
    splits = []
    for split in ("train", "test"):
        with explain_damage(folder, "prepare it anew"):
            source = builder.as_data_source(split, decoders=skip or None, file_format=_FORMAT)
            splits.append(read_split(folder, source, image, label))
    names = tuple(builder.info.features[label].names)
    for _, labels in splits:
        if len(others := labels[(labels < 0) | (labels >= len(names))]):
            raise UserError(
                f"{folder} has the label {others[0]}, which is none of its {len(names)} classes; "
                f"{_OTHER_SOURCE}"
            )
    return archives.Splits(*splits, names)


def _versions(folder, pattern):
    """Returns the folders of complete versions in the folders that match."""
    paths = [path.parent for path in folder.glob(f"{pattern}/{_INFO}")]
    return sorted(path for path in paths if _VERSION.fullmatch(path.name))


def _not_found(name, data_dir):
    names = [
        f"{'/'.join(path.relative_to(data_dir).parts[:-1])}:{path.name}"
        for pattern in ("*/*", "*/*/*")
        for path in _versions(data_dir, pattern)
    ]
    contents = f"it contains {errors.nearest(name, names)}" if names else "it contains none"
    problem = f"{data_dir} does not contain {name!r}, prepared by TFDS: {contents}"
    if not _NAME.fullmatch(name):
        return f"{problem}; write a name such as mnist, mnist:3.0.1 or emnist/balanced"
    program = (
        f"import tensorflow_datasets as tfds; tfds.builder({json.dumps(name)}, data_dir="
        f'{json.dumps(str(data_dir), ensure_ascii=False)}, file_format="{_FORMAT}")'
        ".download_and_prepare()"
    )
    return (
        f"{problem}; to prepare it, run where tensorflow and tensorflow-datasets are installed: "
        f"python -c {shlex.quote(program)}"
    )


def _supervised_keys(folder, info):
    """Returns the names of the image and of the label; raises UserError if there are none."""
    from tensorflow_datasets import features as kinds

    features = {key: f"{key} ({type(kind).__name__})" for key, kind in info.features.items()}
    keys = info.supervised_keys
    if not (isinstance(keys, tuple) and len(keys) == 2 and set(keys) <= set(features)):
        raise UserError(
            f"{folder} does not say which of its features {', '.join(sorted(features.values()))} "
            f"are image and label; {_OTHER_SOURCE}"
        )
    image, label = (info.features[key] for key in keys)
    if not isinstance(label, kinds.ClassLabel) or not label.num_classes:
        raise UserError(
            f"{folder} is not a classification dataset: its labels are {features[keys[1]]}; "
            f"{_OTHER_SOURCE}"
        )
    is_image = len(image.shape) > 1 and image.shape[2:] in ((), (1,), (3,))
    if not is_image or image.np_dtype != np.uint8:
        raise UserError(
            f"{folder} does not contain gray or colored images of 8 bits: {features[keys[0]]} has "
            f"shape {image.shape} and type {np.dtype(image.np_dtype).name}; {_OTHER_SOURCE}"
        )
    sizes = {split: info.splits[split].num_examples for split in info.splits}
    if not (sizes.get("train") and sizes.get("test")):
        raise UserError(
            f"{folder} has the splits {', '.join(sizes) or 'none'}, but train and test are needed; "
            f"{_OTHER_SOURCE}"
        )
    return keys


def read_split(folder, source, image: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a data source of TFDS: images uint8 [N, H, W] or [N, H, W, 3] and labels int32 [N].

    `image` and `label` are names of its features. Raises UserError if images differ in shape.
    """
    images, labels = None, np.empty(len(source), np.int32)
    for start in range(0, len(source), _CHUNK):
        chunk = range(start, min(start + _CHUNK, len(source)))
        for i, example in zip(chunk, source.__getitems__(chunk), strict=True):
            shape = example[image].shape
            if images is None:
                images = np.empty((len(source), *shape), np.uint8)
            if shape != images.shape[1:]:
                raise UserError(
                    f"{folder} contains images of different shapes, {images.shape[1:]} and "
                    f"{shape}; {_OTHER_SOURCE}, with --config.data.size"
                )
            images[i], labels[i] = example[image], example[label]
    return images[..., 0] if images.shape[3:] == (1,) else images, labels


@contextlib.contextmanager
def explain_damage(folder: pathlib.Path, remedy: str) -> Iterator[None]:
    """Turns the errors that TFDS and its readers raise for damaged files into one line.

    `remedy` is what to do once the folder has been moved. Raises UserError.
    """
    from google.protobuf.json_format import ParseError

    try:
        yield
    except (*_ERRORS, ParseError) as error:
        reason = errors.storage_reason(error)
        if reason in (None, os.strerror(errno.ENOENT)):
            reason, remedy = errors.one_line(error), f"move it to another place and {remedy}"
        else:
            remedy = "check its permissions and its disk"
        raise UserError(f"{folder} cannot be read ({reason}); {remedy}") from error
