"""Redraws digits of the test set as people draw and photograph them, and measures the accuracy.

Example:
  python -m tools.redraw --workdir=runs/notebook

Only for networks of MNIST's digits. Prints the accuracy for each kind of picture, on a sample of
the test images that is always the same. With two digits in a picture, both must be found and
classified correctly.
"""

import io

import numpy as np

from seqmnist.errors import UserError
from seqmnist.study import images
from tools import cli

_NUM_IMAGES = 1000


def _resize(image, size):
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def _as_jpeg(page):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(page).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


def draw_sheet(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draws a digit, light on dark, of 20 to 600 pixels on white paper: -> uint8 [H, W]."""
    page = 255 - _resize(image, rng.integers(20, 601))
    before, after = rng.integers(0, len(page), (2, 2))
    return np.pad(page, list(zip(before, after, strict=True)), constant_values=255)


def draw_light_or_dark(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draws half the sheets as dark paper with light strokes."""
    page = draw_sheet(rng, image)
    return page if rng.random() < 0.5 else 255 - page


def draw_faded(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draws with low contrast, as a JPEG of low quality."""
    return _as_jpeg((30 + draw_light_or_dark(rng, image) * 0.7).astype(np.uint8))


def draw_shadow(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draws on a sheet that is 45 % darker at one side, in any direction."""
    page = draw_sheet(rng, image)
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = (np.linspace(-1, 1, n) for n in page.shape)
    slope = np.add.outer(np.sin(angle) * rows, np.cos(angle) * columns)
    slope = (slope - slope.min()) / np.ptp(slope)
    return _as_jpeg((page * (1 - 0.45 * slope)).astype(np.uint8))


def draw_desk(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draws a sheet on a dark desk, photographed at a slight angle with noise."""
    from PIL import Image

    page, desk = draw_sheet(rng, image), int(rng.integers(20, 110))
    margins = rng.integers(len(page) // 5, len(page) + 1, (2, 2))
    page = np.pad(page, margins, constant_values=desk)
    picture = Image.fromarray(page).rotate(
        rng.uniform(-5, 5), Image.Resampling.BICUBIC, fillcolor=desk
    )
    return np.clip(np.asarray(picture) + rng.normal(0, 4, page.shape), 0, 255).astype(np.uint8)


def draw_ruled(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draws on paper with gray lines."""
    page = draw_sheet(rng, image)
    distance = int(rng.integers(len(page) // 12 + 4, len(page) // 4 + 6))
    lines = np.arange(len(page)) % distance < 1 + distance // 30
    level = rng.integers(140, 200)
    return np.where(lines[:, None], np.minimum(page, level), page).astype(np.uint8)


def draw_two(rng: np.random.Generator, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Draws two digits of about the same size beside each other."""
    size = int(rng.integers(40, 400))
    sizes = size, int(size * rng.uniform(0.8, 1.25))
    height = max(sizes) + int(rng.integers(0, size))
    pages = []
    for image, size in zip((one, other), sizes, strict=True):
        top = int(rng.integers(0, height - size + 1))
        pages.append(np.pad(_resize(image, size), ((top, height - size - top), (0, 0))))
    return 255 - np.concatenate(pages, 1)


KINDS = {
    "as they are": lambda rng, image: image,
    "light or dark, 20 to 600 pixels": draw_light_or_dark,
    "the same, faded and as JPEG of quality 60": draw_faded,
    "on ruled paper": draw_ruled,
    "in a shadow": draw_shadow,
    "on a desk": draw_desk,
    "two digits": draw_two,
}


def measure(network, test, name: str, num_images: int) -> float:
    """Returns the share of pictures of a kind in which all digits are found and correct."""
    draw, (test_images, labels) = KINDS[name], test
    num_digits, rng = 1 + (draw is draw_two), np.random.default_rng(0)
    rows = rng.choice(len(labels), (num_images, num_digits), replace=False)
    found, expected = [], []
    for own in rows:
        page = draw(rng, *test_images[own])
        try:
            digits, largest = images.prepare_digits(page, "the picture")
        except UserError:
            continue
        digits = digits if num_digits > 1 else [digits[largest]]
        if len(digits) == num_digits:
            found.append(digits)
            expected.append(labels[own])
    if not found:
        return 0.0
    answers = network.probabilities(np.concatenate(found)).argmax(-1)
    right = answers.reshape(-1, num_digits) == expected
    return float(right.all(1).sum() / num_images)


def _main(arguments):
    network = cli.load(arguments)
    if not images.is_of_digits(network.spec):
        raise UserError(
            f"--workdir={arguments.workdir} holds no network of MNIST's digits; name another run"
        )
    test = network.test_set()
    num_test = len(test[1])
    most = num_test // 2  # two digits to a picture
    num_images = arguments.num_images or min(_NUM_IMAGES, most)
    if num_images > most:
        raise UserError(
            f"--num_images={num_images} needs {2 * num_images:,} test images, and there are "
            f"{num_test:,}; choose at most {most}"
        )
    accuracies = {}
    for name in KINDS:
        accuracies[name] = measure(network, test, name, num_images)
        print(f"{accuracies[name]:.4f}  {name}", flush=True)
    return {"accuracies": accuracies, "num_images": num_images}


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_workdir_argument(parser)
    cli.add_place_arguments(parser)
    parser.add_argument(
        "--num_images",
        type=cli.positive,
        help=f"pictures of each kind (default: {_NUM_IMAGES}, or as many as there are)",
    )
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
