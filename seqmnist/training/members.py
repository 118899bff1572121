"""Members: independent runs that one program trains, of several seeds and settings.

A member is a setting and a seed. All members of the first setting come first, then those of the
second; see `plan`.
"""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from seqmnist.config import Config
from seqmnist.errors import UserError, choose

# What changes no shape and no structure, and the values that it may take.
SWEEPABLE = {
    "optimizer.learning_rate": lambda value: value > 0,
    "optimizer.momentum": lambda value: 0 <= value < 1,
    "optimizer.weight_decay": lambda value: value >= 0,
    "optimizer.clip_norm": lambda value: value > 0,
}
_EXAMPLE = '{"optimizer.learning_rate": [0.001, 0.01]}'


def settings(config: Config) -> list[dict[str, float]]:
    """Returns the settings of the sweep, at least one, each {field: value}.

    Raises:
      UserError: `members.sweep` is not a sweep.
    """
    text = config.members.sweep

    def refuse(reason):
        raise UserError(f"config.members.sweep={text!r} {reason}; write e.g. {_EXAMPLE}")

    try:
        sweep = json.loads(text)
    except ValueError as error:
        refuse(f"is not JSON ({error})")
    if isinstance(sweep, dict):
        for name, values in sweep.items():
            if not isinstance(values, list) or not values:
                refuse(f"needs a list of values for {name}")
        combinations = itertools.product(*sweep.values())
        sweep = [dict(zip(sweep, values, strict=True)) for values in combinations]
    if not isinstance(sweep, list) or not sweep or not all(isinstance(s, dict) for s in sweep):
        refuse("is neither a grid nor a list of settings")
    for setting in sweep:
        if setting.keys() != sweep[0].keys():
            refuse("names other fields in one setting than in another")
        for name, value in setting.items():
            is_valid = choose(SWEEPABLE, name, "members.sweep")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not is_valid(value):
                refuse(f"has {value!r}, which {name} cannot be")
    return [{name: float(value) for name, value in setting.items()} for setting in sweep]


def swept_fields(config: Config) -> list[str]:
    """Returns the fields of which members have values of their own."""
    return list(settings(config)[0])


def plan(config: Config) -> list[dict[str, float]]:
    """Returns what tells members apart: {"seed": …, field: …} for each of S, in order.

    Raises:
      UserError: `members.sweep` is not a sweep, or the seeds would pass 2³² - 1.
    """
    seeds = range(config.seed, config.seed + config.members.num)
    if seeds[-1] > 2**32 - 1:
        raise UserError(
            f"config.members.num={config.members.num} leads to seeds beyond 4294967295; make it "
            "or config.seed smaller"
        )
    return [{"seed": seed, **setting} for setting in settings(config) for seed in seeds]


def summarize(
    config: Config,
    validation: dict[str, list[float]] | None,
    test: dict[str, list[float]],
) -> dict[str, Any]:
    """Sums up members by setting, and names the best by validation, never by test.

    Args:
      config: the configuration.
      validation: {"loss", "accuracy"}, lists of S; None where nothing is held out.
      test: the same.

    Returns:
      {"settings": [{field: value, "validation": s, "test": s}], "best": an index, or None}, where
      s is {"loss", "accuracy"} → {"mean", "sd", "interval"}; the interval holds the mean of all
      seeds in 95 of 100 cases (Student's t).
    """
    count = config.members.num
    result = []
    for i, setting in enumerate(settings(config)):
        entry: dict[str, Any] = {**setting}
        for name, values in (("validation", validation), ("test", test)):
            entry[name] = values and {
                key: _spread(values[key][i * count : (i + 1) * count]) for key in values
            }
        result.append(entry)
    if validation is None:
        return {"settings": result, "best": None}
    accuracies = [entry["validation"]["accuracy"]["mean"] for entry in result]
    return {"settings": result, "best": int(np.nanargmax(accuracies))}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    from scipy import stats  # here, not above: it takes long to import, and one run needs none

    mean, num = float(np.mean(values)), len(values)
    if num == 1:
        return {"mean": mean, "sd": None, "interval": None}
    sd = float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, num - 1)) * sd / math.sqrt(num)
    return {"mean": mean, "sd": sd, "interval": [mean - half, mean + half]}
