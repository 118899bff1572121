"""The four IDX archives of MNIST and its relatives: names, addresses, checksums, download."""

import hashlib
import http.client
import os
import pathlib
import queue
import threading
import urllib.error
import urllib.request
from typing import NamedTuple

import numpy as np

from seqmnist.datasets import idx
from seqmnist.errors import UserError

NAMES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
URLS = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "kmnist": "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
}

# Of TFDS, in TFDS's format: address, size, SHA-256, file name.
_CHECKSUMS = pathlib.Path(__file__).parent / "mnist_family" / "checksums.tsv"
_PATIENCE = 6  # seconds to wait for an answer before there is no network


class DownloadError(UserError):
    """An archive cannot be downloaded."""


class Splits(NamedTuple):
    """Each split is images uint8 [N, 28, 28] and labels uint8 [N], in archive order."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def checksums(dataset: str) -> dict[str, str]:
    """Returns the registered SHA-256 of each archive of a dataset, by file name."""
    lines = [line.split("\t") for line in _CHECKSUMS.read_text().splitlines()]
    return {name: sha256 for url, _, sha256, name in lines if url == URLS[dataset] + name}


def hash_files(folder: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of each archive in a folder, by file name.

    Raises:
      UserError: the folder or an archive is missing or cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"config.data.manual_dir={folder} is not a folder; name an existing one")
    hashes = {}
    for name in sum(NAMES.values(), ()):
        try:
            with open(folder / name, "rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"{folder / name} cannot be read ({error.strerror}); config.data.manual_dir "
                f"needs the four archives {', '.join(sum(NAMES.values(), ()))}"
            ) from None
    return hashes


def read(paths: dict[str, str | os.PathLike]) -> Splits:
    """Reads the four archives.

    Args:
      paths: where each is, by its original name.

    Raises:
      IdxError: one is damaged, or two do not belong together.
    """
    splits = {}
    for split, (images_name, labels_name) in NAMES.items():
        images, labels = idx.read_images(paths[images_name]), idx.read_labels(paths[labels_name])
        if len(images) != len(labels):
            raise idx.IdxError(
                f"{paths[images_name]} holds {len(images):,} images, but {labels_name} beside it "
                f"holds {len(labels):,} labels; get both again"
            )
        if not len(images):
            raise idx.IdxError(f"{paths[images_name]} holds no images; get it again")
        splits[split] = images, labels
    return Splits(**splits)


def download(dataset: str, folder: pathlib.Path) -> None:
    """Downloads the four archives of a dataset into a folder.

    TFDS's own downloader tries for minutes before it gives up; whether there is a network
    should be known in seconds.

    Raises:
      DownloadError: the network or the server does not answer, or refuses.
    """
    for name in checksums(dataset):
        url = URLS[dataset] + name
        try:
            with _open(url) as response, open(folder / name, "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
        except (OSError, http.client.HTTPException) as error:
            says_more = isinstance(error, urllib.error.HTTPError)
            reason = error if says_more else getattr(error, "reason", error)
            raise DownloadError(f"{url} cannot be downloaded ({reason})") from error


def _open(url):
    """Opens an address within `_PATIENCE`, or raises OSError.

    A name lookup has no timeout of its own; a thread that can be left behind gives it one.
    """
    answer = queue.SimpleQueue()

    def ask():
        try:
            answer.put(urllib.request.urlopen(url, timeout=_PATIENCE))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        result = answer.get(timeout=_PATIENCE + 1)
    except queue.Empty:
        raise TimeoutError(f"no answer in {_PATIENCE} s") from None
    if isinstance(result, Exception):
        raise result
    return result
