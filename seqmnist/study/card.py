"""Describes a trained network in words: as facts, and as a model card."""

import importlib.metadata
import json
import re
import string
from typing import Any

from seqmnist import config as config_lib
from seqmnist.config import Config
from seqmnist.display import describe, format_spread
from seqmnist.spec import ImageSpec
from seqmnist.study import export, images
from seqmnist.training import members

_MISSING = "not recorded"
_MAX_NAMES = 20  # of classes, on a card
_CARD = string.Template("""\
# $name

A recurrent network that reads $kind images of $width × $height pixels as sequences and
classifies them into $num_classes classes.

| | |
|---|---|
$facts

It predicts a class for every image; its probabilities do not tell whether the image shows one of
the classes.

## Use

In this folder, with the packages jax, flatbuffers, numpy and pillow:

```python
import hashlib, json
import jax.export, numpy as np
from PIL import Image, ImageOps

$prepare
def load(file):
    content = open(file, "rb").read()  # ends with the SHA-256 of everything before
    if hashlib.sha256(content[:-64]).hexdigest().encode() != content[-64:]:
        raise ValueError(file + " is damaged")
    return jax.export.deserialize(bytearray(content)).call

classify = load("$classifier")
class_names = json.load(open("$spec_file", encoding="utf-8"))["class_names"]
logits = classify(prepare("$picture")[None])  # uint8 [B, $shape] -> float32 [B, $num_classes]
print(class_names[int(logits[0].argmax())])
```

`$classifier` classifies any number B of images; it includes normalization. `$parameters` contains
the parameters by name, `$spec_file` the size of images and the names of the classes, by label.
`draw.html`, if it is here, is a page to draw on that runs the network in a browser.
$steps
## Prepare an image

The network knows only images like those that it was trained on$preparation

## How long the files can be read

The files `*.jax_export` were written for $platforms by JAX $jax with jaxlib $jaxlib. JAX
[promises](https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees) to run them
with versions "up to 6 months newer than the version of JAX used for exporting", and with versions
"up to 3 weeks older"; what counts is when jaxlib was built. After that, install the versions above
or export the run again. All other files can be read without JAX, and have no such limit.

## Configuration

```json
$config
```
""")
_STEPS = string.Template("""
`$step_file` reads one time step of B sequences, float32 [B, $size], pixels / 255, and returns the
logits for what has been read so far. `$initial_state` contains the state of one sequence before the
first step, a list of arrays. After the lines above:

```python
step = load("$step_file")
state = list(np.load("$initial_state").values())  # of B sequences: np.repeat(each, B, axis=0)
x = np.zeros((1, $size), np.float32)
state, logits = step(state, x)  # logits: float32 [1, $num_classes]
```
""")
_PREPARE_DIGIT = """\
def prepare(file):  # a picture of one digit, dark strokes on clean light paper
    ink = ImageOps.invert(Image.open(file).convert("L"))
    ink = ink.crop(ink.point(lambda value: 255 * (value > 64)).getbbox())
    ink = ImageOps.contain(ink, (20, 20))
    mass = np.asarray(ink, float)
    centre = (np.indices(mass.shape) * mass).sum((1, 2)) / mass.sum()
    top, left = (round(14 - c) for c in centre)
    image = Image.new("L", (28, 28))
    image.paste(ink, (left, top))
    return np.asarray(image)
"""
_DIGIT_PREPARATION = """\
: a digit as in MNIST, with
light strokes (up to 255) on a dark background (0), 20 pixels at its longer side, its centre of mass
at row 14 and column 14 of 28 × 28. `prepare` makes it from a picture of one digit, dark on clean,
evenly lit paper. Anything else on the picture, such as lines, shadows or a table, changes the
answer."""
_PREPARE_OTHER = string.Template("""\
def prepare(file):
    return np.asarray(Image.open(file).convert("$mode").resize(($width, $height)))
""")
_OTHER_PREPARATION = string.Template("""\
, those of
$data: $kind, bytes from 0 to 255, $width × $height pixels. `prepare` converts and resizes a
picture, and nothing else; replace `$picture` by the name of your own.""")


def format_score(score: Any, member: int | None = None) -> str:
    """Formats a score, a number or None; of a list, one per member, mean ± standard deviation.

    With `member`, its own score comes first.
    """
    if not isinstance(score, list):
        return format_spread({"mean": score, "sd": None})
    text, count = format_spread(members.statistics(score)), sum(x is not None for x in score)
    if count < len(score):
        text += f" ({count} of {len(score)} seeds)"
    return text if member is None else f"{format_score(score[member])} (all seeds: {text})"


def scores(results: dict[str, Any], member: int | None = None) -> dict[str, str]:
    """Returns the scores in `results.json` as text, e.g. {"test accuracy": "0.9447", …}.

    In a sweep, they are those of the member's setting; without `member`, of the one that validation
    chose.
    """
    num_settings, own = len(results.get("settings") or [None]), slice(None)
    if num_settings > 1:
        count = len(results["members"]) // num_settings
        setting = (results["best"] or 0) if member is None else member // count
        own = slice(setting * count, (setting + 1) * count)
        member = member and member % count

    def text(score):
        return format_score(score[own] if isinstance(score, list) else score, member)

    return {
        f"{split} {name}": text(results.get(split, {}).get(name))
        for split, name in (("validation", "accuracy"), ("test", "accuracy"), ("test", "loss"))
    }


def facts(
    config: Config, results: dict[str, Any], member: int | None, step: int | None = None
) -> dict[str, str]:
    """Returns what is known about a network as text, e.g. {"parameters": "6,602", …}.

    `results` is what `results.json` holds, empty if the run has not finished; `member` is the
    network's number among the run's members, or None; `step` is that of its checkpoint.
    """
    dataset, optimizer = results.get("dataset", {}), config.optimizer
    sizes = [f"{dataset[s]:,} {s}" for s in ("train", "validation", "test") if dataset]
    num_epochs = results.get("epochs", config.train.num_epochs)  # it may have stopped early
    epochs = f"{num_epochs} epoch{'s' * (num_epochs != 1)}"
    seconds = [f"{value} ({name})" for name, value in results.get("seconds", {}).items()]
    versions = [f"{name} {value}" for name, value in results.get("versions", {}).items()]
    own = {}
    if member is not None:
        listed = results.get("members") or members.list_members(config)
        own = {"member": member, **listed[member]}
    rate = own.get("optimizer.learning_rate", optimizer.learning_rate)
    return {
        "network": describe(config.model),
        "parameters": f"{results['parameters']:,}" if results else _MISSING,
        "data": ", ".join([dataset.get("name", config.data.name), *sizes]),
        "fingerprint of the data": dataset.get("fingerprint", _MISSING),
        "training": f"{epochs}, batches of {config.train.batch_size}, {optimizer.name}, learning "
        f"rate {rate}",
        "seed": str(config.seed),
        **{name: str(value) for name, value in own.items()},
        **({} if step is None else {"checkpoint": f"step {step}"}),
        "devices": ", ".join(results.get("devices", [_MISSING])),
        "seconds": ", ".join(seconds) or _MISSING,
        **scores(results, member),
        "versions": ", ".join(versions) or _MISSING,
    }


def model_card(
    name: str,
    config: Config,
    results: dict[str, Any],
    member: int | None,
    spec: ImageSpec,
    step: int | None = None,
    streaming: export.Streaming | None = None,
) -> str:
    """Returns a model card in Markdown, for the files that `export.write` writes.

    For the arguments, see `facts` and `export.write`. No path of this machine is on the card.
    """
    values = config_lib.to_dict(config)
    values["data"] |= dict.fromkeys(config_lib.PLACES)
    plugins = config_lib.plugin_names(config)
    values["plugins"] = ",".join(name.rpartition("/")[2] for name in plugins)
    known = facts(config, results, member, step)
    rows = [f"| {key} | {value} |" for key, value in known.items()]
    if notice := results.get("dataset", {}).get("notice"):
        # Its reason and folders are of interest on the machine of the run only.
        notice = re.sub(r"(?<!\S)/\S+", "…", notice.partition(", because ")[0])
        rows.append(f"| notice | {notice} |")
    names = list(spec.class_names[:_MAX_NAMES])
    names += [f"and {more} more"] if (more := spec.num_classes - len(names)) else []
    listed = ", ".join(names).replace("|", "\\|")
    rows.insert(0, f"| classes, by label | {listed} |")
    is_digit = images.is_of_digits(spec)
    words = {
        "name": name,
        "kind": "gray" if spec.channels == 1 else "color",
        "mode": "L" if spec.channels == 1 else "RGB",
        "height": spec.height,
        "width": spec.width,
        "shape": ", ".join(map(str, spec.shape)),
        "num_classes": spec.num_classes,
        "size": streaming and streaming.size,
        "data": results.get("dataset", {}).get("name", config.data.name),
        "facts": "\n".join(rows),
        "config": json.dumps(values, indent=2),
        "classifier": export.ARTIFACT,
        "step_file": export.STEP,
        "initial_state": export.INITIAL_STATE,
        "parameters": export.PARAMETERS,
        "spec_file": export.IMAGES,
        "picture": export.EXAMPLE if is_digit else "picture.png",
        "platforms": ", ".join(export.PLATFORMS),
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    return _CARD.substitute(
        words,
        prepare=_PREPARE_DIGIT if is_digit else _PREPARE_OTHER.substitute(words),
        preparation=_DIGIT_PREPARATION if is_digit else _OTHER_PREPARATION.substitute(words),
        steps=_STEPS.substitute(words) if streaming else "",
    )
