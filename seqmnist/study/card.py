"""Describes a trained network in words: as facts, and as a model card."""

import json
from typing import Any

import numpy as np

from seqmnist import config as config_lib
from seqmnist.config import Config
from seqmnist.display import describe
from seqmnist.spec import ImageSpec

_MISSING = "not recorded"
_MAX_NAMES = 20  # of classes, on a card
_CARD = """\
# {name}

A recurrent network that reads {kind} images of {width} × {height} pixels as sequences and
classifies them into {num_classes} classes.

| | |
|---|---|
{facts}

The network knows only images like those it was trained on, prepared in the same way. It predicts a
class for every image; its probabilities do not tell whether the image shows one of the classes.

{usage}

## Configuration

```json
{config}
```
"""


def format_score(score: Any, member: int | None = None) -> str:
    """Formats a score, a number or null; of one score per member, mean ± standard deviation.

    With `member`, its own score comes before those.
    """
    if not isinstance(score, list):
        return "–" if score is None else f"{score:.4f}"
    values = [value for value in score if value is not None]
    text = f"{np.mean(values):.4f}" if values else "–"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.4f}"
    if len(values) < len(score):
        text += f" ({len(values)} of {len(score)} seeds)"
    return text if member is None else f"{format_score(score[member])} (all seeds: {text})"


def format_spread(spread: dict[str, Any] | None) -> str:
    """Formats what `members.spread` returns as mean ± standard deviation; – if there is no mean."""
    if not spread or spread["mean"] is None:
        return "–"
    return f"{spread['mean']:.4f}" + (f" ± {spread['sd']:.4f}" if spread["sd"] is not None else "")


def scores(results: dict[str, Any], member: int | None = None) -> dict[str, str]:
    """Returns the scores in `results.json` as text, e.g. {"test accuracy": "0.9447", …}.

    Of a sweep, they are those of the member's setting, or of the one that validation chose.
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

    `results` is what `results.json` holds, empty if the run has not finished; `member` is which of
    the run's members the network is, or None; `step` that of its checkpoint.
    """
    dataset, optimizer = results.get("dataset", {}), config.optimizer
    sizes = [f"{dataset[s]:,} {s}" for s in ("train", "validation", "test") if dataset]
    seconds = [f"{value} ({name})" for name, value in results.get("seconds", {}).items()]
    versions = [f"{name} {value}" for name, value in results.get("versions", {}).items()]
    own = {}
    if member is not None:
        own = {"member": member, **results.get("members", {member: {}})[member]}
    rate = own.get("optimizer.learning_rate", optimizer.learning_rate)
    return {
        "network": describe(config.model),
        "parameters": f"{results['parameters']:,}" if results else _MISSING,
        "data": ", ".join([dataset.get("name", config.data.name), *sizes]),
        "fingerprint of the data": dataset.get("fingerprint", _MISSING),
        "training": f"{config.train.num_epochs} epochs, batches of {config.train.batch_size}, "
        f"{optimizer.name}, learning rate {rate}",
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
    usage: str,
    step: int | None = None,
) -> str:
    """Returns a model card in Markdown; for the arguments, see `facts`.

    `spec` is that of the network's images. `usage` tells how to use the files beside the card. No
    path of this machine is on the card.
    """
    values = config_lib.to_dict(config)
    values["data"] |= {"data_dir": None, "manual_dir": None}
    values["plugins"] = ",".join(path.rpartition("/")[2] for path in config.plugins.split(","))
    rows = [f"| {key} | {value} |" for key, value in facts(config, results, member, step).items()]
    if notice := results.get("dataset", {}).get("notice"):
        rows.append(f"| notice | {notice} |")
    names = list(spec.class_names[:_MAX_NAMES])
    names += [f"and {more} more"] if (more := spec.num_classes - len(names)) else []
    listed = ", ".join(names).replace("|", "\\|")
    rows.insert(0, f"| classes | {listed} |")
    return _CARD.format(
        name=name,
        kind="gray" if spec.channels == 1 else "color",
        height=spec.height,
        width=spec.width,
        num_classes=spec.num_classes,
        facts="\n".join(rows),
        usage=usage,
        config=json.dumps(values, indent=2),
    )
