"""What the images of a dataset are: the one source of sizes and names."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """The size of images, in pixels, and the names of their classes, by label."""

    height: int
    width: int
    channels: int  # 1 is gray, 3 are red, green and blue
    class_names: tuple[str, ...]
    # Whether nearly all images have an empty border; False only if all else is as in MNIST.
    has_margins: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image: (H, W) if it is gray, else (H, W, channels)."""
        size = (self.height, self.width)
        return size if self.channels == 1 else (*size, self.channels)

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return dataclasses.asdict(self) | {"class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ImageSpec":
        """Returns the spec that `to_dict` has written."""
        return cls(**{**values, "class_names": tuple(values["class_names"])})


MNIST = ImageSpec(28, 28, 1, tuple("0123456789"))
