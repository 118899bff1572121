"""Members: independent runs that one program trains, of several seeds and settings.

A member is a setting and a seed. All members of the first setting come first, then those of the
second; see `list_members`.
"""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from seqmnist import config as config_lib
from seqmnist.config import Config
from seqmnist.errors import UserError

# Fields that change no shape and no structure; so are float options of a cell or an optimizer.
SWEEPABLE = tuple(
    f"optimizer.{name}" for name in ("learning_rate", "momentum", "weight_decay", "clip_norm")
)
_EXAMPLE = '{"optimizer.learning_rate": [0.001, 0.01]}'
MOST_MEMBERS = 4096


def settings(config: Config) -> list[dict[str, float]]:
    """Returns the settings of the sweep, at least one, each {field: value}.

    Raises UserError if `members.sweep` is not a sweep, or if one of its fields does nothing.
    """
    text = config.members.sweep

    def refuse(reason):
        raise UserError(f"config.members.sweep={text[:100]!r} {reason}; write e.g. {_EXAMPLE}")

    def unique(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            refuse(f"names {max(names, key=names.count)} twice")
        return dict(pairs)

    try:
        sweep = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        refuse(f"is not JSON ({error})")
    if isinstance(sweep, dict):
        for name, values in sweep.items():
            if not isinstance(values, list) or not values:
                refuse(f"needs a list of values for {name}")
        if math.prod(map(len, sweep.values())) > MOST_MEMBERS:
            refuse(f"has more than {MOST_MEMBERS} settings")
        combinations = itertools.product(*sweep.values())
        sweep = [dict(zip(sweep, values, strict=True)) for values in combinations]
    if not isinstance(sweep, list) or not sweep or not all(isinstance(s, dict) for s in sweep):
        refuse("is neither a grid nor a list of settings")
    for name in sweep[0]:
        if not config_lib.option_group(name):
            if name not in SWEEPABLE:
                refuse(
                    f"has {name}, which cannot be swept, unlike {', '.join(SWEEPABLE)} and options "
                    "of a cell or an optimizer that are floats"
                )
            config_lib.check_acts(config, name)
    for setting in sweep:
        if setting.keys() != sweep[0].keys():
            refuse("names other fields in one setting than in another")
        for name, value in setting.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                refuse(f"has {value!r} for {name}, which must be a number")
            if not config_lib.option_group(name):
                config_lib.checked(name, value)
            elif not abs(value) <= config_lib.LARGEST:
                refuse(f"has a number for {name} that float32 cannot hold")
    trained = {tuple(np.float32(setting[name]) for name in sweep[0]) for setting in sweep}
    if len(trained) < len(sweep):
        refuse("has a setting twice, to the precision of float32")
    return [{name: float(value) for name, value in setting.items()} for setting in sweep]


def list_members(config: Config) -> list[dict[str, float]]:
    """Returns what tells members apart: {"seed": …, field: …} for each of S, in order.

    Raises UserError as `settings` does, if a seed exceeds 2³² - 1, or if members are too many.
    """
    seeds = range(config.seed, config.seed + config.members.num)
    if seeds[-1] > 2**32 - 1:
        raise UserError(
            f"config.members.num={config.members.num} leads to seeds beyond 4294967295; make it "
            "or config.seed smaller"
        )
    each = settings(config)
    if len(each) * len(seeds) > MOST_MEMBERS:
        raise UserError(
            f"{len(each)} settings × config.members.num={len(seeds)} are more than {MOST_MEMBERS} "
            "members; make one of them smaller"
        )
    return [{"seed": seed, **setting} for setting in each for seed in seeds]


def best_setting(config: Config, losses: np.ndarray | None, diverged: np.ndarray) -> int | None:
    """Returns the number of the setting that validation chooses; None without validation.

    Among the settings with the fewest members that `diverged`, bool [S], it is the one with the
    lowest mean of the other members' validation `losses`, [S].
    """
    if losses is None:
        return None
    shape = (-1, config.members.num)
    bad, losses = np.reshape(diverged, shape), np.reshape(losses, shape)
    means = np.where(bad, 0, losses).sum(1) / np.maximum(1, (~bad).sum(1))
    return int(np.lexsort((means, bad.sum(1)))[0])


def summarize(
    config: Config,
    diverged: np.ndarray,
    validation: dict[str, list[float]] | None,
    test: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """Sums up members by setting.

    Scores are {"loss", "accuracy"}, lists of S values; without validation, None. NaN, as for
    members that `diverged`, bool [S], is left out.

    Returns [{field: value, "diverged": count, "validation": s, "test": s}], where s is {"loss",
    "accuracy"} → {"mean", "sd", "interval"}; the interval is the 95 % confidence interval of the
    mean over seeds (Student's t).
    """
    count, result = config.members.num, []
    for i, setting in enumerate(settings(config)):
        own = slice(i * count, (i + 1) * count)
        entry = {**setting, "diverged": int(diverged[own].sum())}
        for name, scores in (("validation", validation), ("test", test)):
            entry[name] = scores and {key: statistics(scores[key][own]) for key in scores}
        result.append(entry)
    return result


def statistics(values: Sequence[float | None]) -> dict[str, Any]:
    """Returns {"mean", "sd", "interval": 95 %, Student's t}; NaN and None are left out."""
    finite = np.array(values, float)
    finite = finite[np.isfinite(finite)]
    num = len(finite)
    mean = float(np.mean(finite)) if num else None
    if num < 2:
        return {"mean": mean, "sd": None, "interval": None}
    sd = float(np.std(finite, ddof=1))
    from scipy import special  # imported here: one run needs none

    half = float(special.stdtrit(num - 1, 0.975)) * sd / math.sqrt(num)
    return {"mean": mean, "sd": sd, "interval": [mean - half, mean + half]}
