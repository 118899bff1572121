"""A folder of picture files, one sub-folder per class, as a dataset."""

import concurrent.futures
import hashlib
import os
import pathlib
import warnings
from collections.abc import Callable

import numpy as np

from seqmnist.datasets import archives, pictures
from seqmnist.errors import UserError
from seqmnist.paths import natural_order

_LAYOUTS = "train/CLASS/* and test/CLASS/*, or in CLASS/*"
_SPLITS = ("train", "test")
_HELD_OUT = {"val", "valid", "validation", "dev", "eval"}  # names that others give to a test set
# What systems and programs leave in folders, besides names that begin with a dot.
_HIDDEN = {"Thumbs.db", "desktop.ini", "__MACOSX"}
_TEST_EVERY = 5  # of each class, without a test folder, the last of five pictures is for testing
_NUM_THREADS = 4
_MOST_NAMED = 10  # pictures in a message


def read(
    folder: pathlib.Path, grayscale: bool, size: int | None, say: Callable[[str], None]
) -> archives.Splits:
    """Reads all pictures of train/CLASS/* and test/CLASS/*, or of CLASS/*, below a folder.

    Without train and test folders every fifth picture of a class, by name, is for testing. Classes
    and pictures are in natural order of their names: 2 before 10. If all names of a split are
    different whole numbers, its examples are in order of these, so that a folder keeps the order of
    the arrays it was written from. Otherwise classes are interleaved in proportion, so that any
    part of a split holds every class in its share.

    Args:
      folder: the folder.
      grayscale: whether colored pictures become gray.
      size: pixels per side that pictures are resized to; None keeps them, all of one size.
      say: called with a line about files that are not read.

    Returns:
      Per split images uint8 [N, H, W], or [N, H, W, 3] if colored, and labels int32 [N], which
      index the class names.

    Raises:
      UserError: the folder has another layout, or there are pictures that cannot be read, all of
        which are named, or that differ in size or kind.
    """
    class_names, files = _find(folder, say)
    ordered = [_order(files[split]) for split in _SPLITS]
    paths = [path for split in ordered for path, _ in split]
    images = _decode(folder, paths, grayscale, size)
    labels = np.array([label for split in ordered for _, label in split], np.int32)
    n = len(ordered[0])
    return archives.Splits((images[:n], labels[:n]), (images[n:], labels[n:]), class_names)


def fingerprint_of_files(path: pathlib.Path) -> str:
    """Returns a SHA-256 that changes if a file does: of names, sizes and times, not of contents.

    Of a folder, all files below count except hidden ones. Raises UserError if the path is missing
    or cannot be read.
    """
    try:
        root = path.resolve()
        lines = sorted(_stamps(root, "", set()))
    except (OSError, RuntimeError) as error:  # the latter of links that form a circle
        reason = getattr(error, "strerror", None) or "its links form a circle"
        raise UserError(
            f"{path} cannot be read ({reason}); name it with config.data.manual_dir"
        ) from None
    return hashlib.sha256(b"\0".join([os.fsencode(root), *lines, b""])).hexdigest()


def _stamps(root, relative, seen):
    """Yields name, size and time of files; folders that are links are entered once."""
    path = root / relative
    status = path.stat()
    if not os.path.isdir(path):
        yield b"%s\0%d\0%d" % (os.fsencode(relative), status.st_size, status.st_mtime_ns)
    elif (identity := (status.st_dev, status.st_ino)) not in seen:
        seen.add(identity)
        for name in sorted(os.listdir(path)):
            if _is_hidden(name):
                continue
            below = os.path.join(relative, name)
            if (root / below).exists():
                yield from _stamps(root, below, seen)
            else:  # a link to nothing
                yield os.fsencode(below)


def _find(folder, say):
    """Returns the class names, and for each split the list of each class's picture files."""
    if not os.path.isdir(folder):
        fault = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise UserError(f"{folder} {fault}; name a folder with pictures in {_LAYOUTS}")
    skipped = []
    if roots := _split_folders(folder, skipped):
        found = {split: _find_classes(roots[split], folder, skipped) for split in _SPLITS}
        _check_same_classes(folder, **found)
    else:
        found = _split(folder, _find_classes(folder, folder, skipped))
    class_names = tuple(found["train"])
    if len(class_names) == 1:
        raise UserError(f"{folder} contains a single class, {class_names[0]}; add another class")
    if skipped:
        say(f"Skipped in {folder}, not pictures in class folders: {_name(skipped, folder)}")
    return class_names, {split: list(classes.values()) for split, classes in found.items()}


def _split_folders(folder, skipped):
    """Returns the folders of the splits, or none if those in `folder` are classes."""
    roots = {split: folder / split for split in _SPLITS if os.path.isdir(folder / split)}
    if len(roots) == 1:
        [(split, root)] = roots.items()
        if not any(os.path.isdir(path) for path in _listdir(root)):
            return {}  # a class of this name
        other = _SPLITS[split == "train"]
        alike = [
            path for path in _listdir(folder) if path.name.lower() in _HELD_OUT and path.is_dir()
        ]
        if split == "train" and alike:
            raise UserError(
                f"{folder} contains folders train and {alike[0].name} but no folder test; rename "
                f"{alike[0].name} to test, or name with config.data.manual_dir a folder that has it"
            )
        raise UserError(
            f"{folder} contains a folder {split} of classes but no folder {other}; add it, or move "
            f"the class folders of {split} up, where every fifth picture is for testing"
        )
    if not roots:
        for path in _listdir(folder):
            is_split = path.name.lower() in ("train", "test", "training", "testing")
            if is_split and path.is_dir() and any(map(os.path.isdir, _listdir(path))):
                raise UserError(f"{path} must be named train or test, in small letters; rename it")
    if roots:
        skipped += [path for path in _listdir(folder) if path.name not in roots]
    return roots


def _find_classes(root, folder, skipped):
    """Returns the paths of the pictures of each class folder, by class name, in natural order."""
    classes = {}
    for path in _listdir(root):
        if os.path.isdir(path):
            if not path.name.isprintable():
                raise UserError(f"the class folder {_show(path)} has no printable name; rename it")
            classes[path.name] = _find_pictures(path, skipped)
        else:
            skipped.append(path)
    if not classes:
        raise UserError(f"{root} contains no class folders; put the pictures in {_LAYOUTS}")
    if empty := [root / name for name, paths in classes.items() if not paths]:
        raise UserError(
            f"{folder} contains class folders without pictures: "
            f"{_name(empty, folder, _MOST_NAMED)}; put them in {_LAYOUTS}, not in deeper folders"
        )
    return classes


def _find_pictures(path, skipped):
    found = []
    for file in _listdir(path):
        is_picture = file.suffix.lower() in pictures.extensions() and not os.path.isdir(file)
        (found if is_picture else skipped).append(file)
    return found


def _listdir(path):
    """Returns what a folder contains, without hidden files, in natural order."""
    try:
        names = [name for name in os.listdir(path) if not _is_hidden(name)]
    except OSError as error:
        raise UserError(
            f"{_show(path)} cannot be read ({error.strerror}); check its permissions"
        ) from None
    return [path / name for name in sorted(names, key=natural_order)]


def _is_hidden(name):
    return name.startswith(".") or name in _HIDDEN


def _check_same_classes(folder, train, test):
    for here, there, where in ((train, test, "test"), (test, train, "train")):
        if missing := [name for name in here if name not in there]:
            raise UserError(
                f"{folder}/{where} lacks the class {_list(missing, 3)}, which the other split has; "
                "both need the same class folders"
            )


def _split(folder, classes):
    """Keeps every fifth picture of each class for testing."""
    found = {split: {} for split in _SPLITS}
    for name, paths in classes.items():
        if len(paths) < _TEST_EVERY:
            raise UserError(
                f"the class {name} of {folder} has fewer than {_TEST_EVERY} pictures, of which "
                f"every fifth is for testing; add some, or use train/CLASS/* and test/CLASS/*"
            )
        found["test"][name] = paths[_TEST_EVERY - 1 :: _TEST_EVERY]
        found["train"][name] = [p for k, p in enumerate(paths, 1) if k % _TEST_EVERY]
    return found


def _order(classes):
    """Returns (path, label) of a split's examples in their order; see `read`."""
    examples = [
        ((k + 0.5) / len(paths), label, path)
        for label, paths in enumerate(classes)
        for k, path in enumerate(paths)
    ]
    if all(path.stem.isdecimal() for _, _, path in examples):
        numbers = {int(path.stem) for _, _, path in examples}
        if len(numbers) == len(examples):
            examples = [(int(path.stem), label, path) for _, label, path in examples]
    examples.sort(key=lambda example: example[:2])
    return [(path, label) for _, label, path in examples]


def _decode(folder, paths, grayscale, size):
    """Returns all pictures, uint8 [N, H, W] or [N, H, W, 3]."""

    def decode(path):
        try:
            image = pictures.read_picture(path)
        except UserError as error:
            return error
        image = pictures.to_channels(image, 1) if grayscale else image
        return pictures.resize(image, size, size) if size else image

    images, bad, first_of_shape = None, {}, {}
    # Threads that each set warning filters aside may restore those of another.
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        for i, (path, image) in enumerate(zip(paths, pool.map(decode, paths), strict=True)):
            if isinstance(image, UserError):
                bad[path] = image
                continue
            first_of_shape.setdefault(image.shape, path)
            if images is None:
                images = pictures.allocate(len(paths), image.shape, folder)
            if len(first_of_shape) == 1:
                images[i] = image
    if bad:
        bad = dict(sorted(bad.items(), key=lambda item: natural_order(item[0])))
        path, error = next(iter(bad.items()))
        reason = str(error).removeprefix(f"{path} ").rpartition("; ")[0]
        raise UserError(
            f"{len(bad):,} of {len(paths):,} pictures in {folder} cannot be read: "
            f"{_name(bad, folder, _MOST_NAMED)} (the first {reason}); replace "
            "or remove them"
        )
    _check_alike(folder, first_of_shape)
    return images


def _check_alike(folder, first_of_shape):
    """Raises UserError unless there is one shape; `first_of_shape` maps each to a picture."""
    paths = {len(shape): path for shape, path in first_of_shape.items()}
    if len(paths) > 1:
        gray, colored = _name([paths[2]], folder), _name([paths[3]], folder)
        raise UserError(
            f"{folder} contains gray and colored pictures, e.g. {gray} is gray and {colored} "
            "colored; --config.data.grayscale=true makes all gray"
        )
    if len(first_of_shape) > 1:
        (shape, path), (other, other_path), *_ = first_of_shape.items()
        size = min(shape[:2])
        raise UserError(
            f"{folder} contains pictures of different sizes, e.g. {_name([path], folder)} has "
            f"{_pixels(shape)} and {_name([other_path], folder)} {_pixels(other)}; "
            f"--config.data.size={size} resizes all to {size} × {size}"
        )


def _pixels(shape):
    return f"{shape[1]:,} × {shape[0]:,} pixels"


def _name(paths, folder, most=1):
    return _list([_show(path.relative_to(folder)) for path in paths], most)


def _list(names, most):
    """Returns the first `most` of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _show(path):
    """Returns a path as text that can be printed on one line."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
