"""A study: a fair comparison of networks, planned in a Python file.

Each entry is a configuration. Its settings are chosen by validation from a grid; the chosen one is
trained again from fresh seeds, and only then scored on the test set.
"""

import bisect
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from seqmnist import config as config_lib
from seqmnist.config import Config
from seqmnist.display import describe as describe_network
from seqmnist.errors import UserError
from seqmnist.networks.model import SequenceClassifier
from seqmnist.spec import ImageSpec
from seqmnist.study import compare, profiling
from seqmnist.training import members
from seqmnist.training.steps import init_state, make_system
from seqmnist.workdir import NUMBER, SPREAD

# What is read of `describe`, see `workdir.fits`.
_TRIED = {"diverged": int, "validation": {"loss": {"mean": NUMBER}}}
ENTRY_KINDS = {
    "parameters": int,
    "flops_per_image": int,
    "seeds": [int],
    "setting": dict,
    "at_edge": list,
    "diverged": int,
    "scores": {"test/accuracy": [NUMBER]},
    "validation/accuracy": SPREAD,
    "test/accuracy": SPREAD,
    "tried": ([_TRIED], []),
}
_MOST_UNITS = 65536  # as config.model.hidden_size
_GIVEN = re.compile(r"(data|members)\.")  # fields that are the same in all settings


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and how.

    Attributes:
      entries: a configuration for each name.
      seeds: consecutive, such as range(100, 110); the compared networks are trained from these.
      select: a grid {field: values}, tried for each entry; the setting with the lowest mean
        validation loss is chosen.
      selection_seeds: the seeds from which the settings are tried; none of them is in `seeds`.
      budget: the largest number of parameters of a network, one for all or by the name of each
        entry; hidden sizes are the largest within it. None leaves hidden sizes as they are.
    """

    entries: Mapping[str, Config]
    seeds: range
    select: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    selection_seeds: range = range(1)
    budget: int | Mapping[str, int] | None = None

    def __post_init__(self):
        """Raises UserError if it would not be a fair comparison."""
        for name in ("seeds", "selection_seeds"):
            seeds = getattr(self, name)
            if not isinstance(seeds, range) or seeds.step != 1 or not seeds:
                raise UserError(f"{name}={seeds} must be a range of consecutive numbers")
        if self.select and set(self.seeds) & set(self.selection_seeds):
            raise UserError(
                f"seeds={self.seeds} and selection_seeds={self.selection_seeds} overlap; choose "
                "others, since scores of the seeds that chose a setting are too good"
            )
        if not self.entries:
            raise UserError("entries={} is empty; name at least one network")
        for name, config in self.entries.items():
            if not name or set(name) & {"/", "\\", "\0"} or name.startswith("."):
                raise UserError(f"{name!r} cannot be the name of a folder; choose another")
            for field in ("members.num", "members.sweep", "seed"):
                if config_lib.get(config, field) != config_lib.fields()[field].default:
                    raise UserError(f"{name}: config.{field} is set by the study; leave it out")
            if self.select and not config.data.validation_fraction:
                raise UserError(
                    f"{name}: settings are chosen by validation, never by test; set "
                    "config.data.validation_fraction above 0"
                )
        fractions = {config.data.validation_fraction for config in self.entries.values()}
        if len(fractions) > 1:
            raise UserError(
                "entries differ in config.data.validation_fraction; give all the same, so that "
                "they are trained on the same examples"
            )
        budgets = self.budget if isinstance(self.budget, Mapping) else {"": self.budget}
        if isinstance(self.budget, Mapping) and self.budget.keys() != self.entries.keys():
            names = ", ".join(sorted(map(str, self.entries.keys() ^ self.budget.keys())))
            raise UserError(f"budget: name exactly the entries; these are not in both: {names}")
        for budget in budgets.values():
            if budget is not None and (type(budget) is not int or budget < 1):
                raise UserError(f"budget: {budget!r} must be a whole number above zero, or None")
        for field, values in self.select.items():
            config_lib.check_field_name(field)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise UserError(f"select: {field} needs a list of values; got {values!r}")
            is_fitted = field == "model.hidden_size" and self.budget is not None
            if is_fitted or field in ("seed", *config_lib.NEUTRAL) or _GIVEN.match(field):
                raise UserError(
                    f"select: {field} is not a choice: {'budget' if is_fitted else 'the study'} "
                    "gives it, or it changes no result; leave it out"
                )
        select = {field: _numbers(values) for field, values in self.select.items()}
        for field, values in select.items():
            if twice := [value for value in values if values.count(value) > 1]:
                raise UserError(f"select: {field} has {twice[0]!r} twice; leave one out")
        object.__setattr__(self, "select", select)  # it is frozen

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return {
            "entries": {
                name: config_lib.to_dict(_valid(name, each)) for name, each in self.entries.items()
            },
            "seeds": [self.seeds.start, self.seeds.stop],
            "select": dict(self.select),
            "selection_seeds": [self.selection_seeds.start, self.selection_seeds.stop],
            "budget": dict(self.budget) if isinstance(self.budget, Mapping) else self.budget,
        }


def load(path: str | os.PathLike) -> Study:
    """Returns what `get_study()` of a Python file returns; raises UserError unless a `Study`."""
    return config_lib.made_by(path, "STUDY", "get_study", Study)


def num_parameters(config: Config, spec: ImageSpec) -> int:
    """Counts the parameters of a network from their shapes."""
    model = nnx.eval_shape(lambda: SequenceClassifier(config.model, spec, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def fit(config: Config, spec: ImageSpec, budget: int | None) -> Config:
    """Returns a configuration with the largest hidden size that stays within a budget.

    Raises UserError if the smallest network exceeds it.
    """
    if budget is None:
        return config

    def count(units):
        return num_parameters(config_lib.override(config, {"model.hidden_size": units}), spec)

    least = config.model.cell_options.get("num_heads", 1)  # which divides the hidden size
    if count(least) > budget:
        raise UserError(
            f"the {count(least):,} parameters of {config.model.cell} with hidden_size={least} "
            f"exceed the budget of {budget:,}; raise it, or leave the entry out"
        )
    most = least  # doubled until it does not fit: large networks of S5 take long
    while most <= _MOST_UNITS and count(most) <= budget:
        most *= 2
    sizes = range(least, min(most, _MOST_UNITS + 1), least)
    units = least * bisect.bisect_right(sizes, budget, key=count)
    return config_lib.override(config, {"model.hidden_size": units})


def selection(study: Study, name: str, spec: ImageSpec) -> list[tuple[dict[str, Any], Config]]:
    """Returns the runs that try an entry's grid: ({field: value} that a run fixes, configuration).

    Fields that can be swept are not fixed: their settings are members of one run.
    """
    swept, fixed = {}, {}
    for field, values in study.select.items():
        (swept if _can_be_swept(field, values) else fixed)[field] = values
    runs = []
    for values in itertools.product(*fixed.values()):
        setting = dict(zip(fixed, values, strict=True))
        runs.append((setting, _run(study, name, setting, study.selection_seeds, spec, swept)))
    return runs


def _numbers(values):
    """Returns a list, with numbers of Python in place of NumPy's."""
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def _can_be_swept(field, values):
    is_option = config_lib.option_group(field) and all(isinstance(x, float) for x in values)
    return None not in values and (field in members.SWEEPABLE or is_option)


def final(study: Study, name: str, setting: Mapping[str, Any], spec: ImageSpec) -> Config:
    """Returns the run that is compared: an entry in its chosen setting, from fresh seeds."""
    return _run(study, name, setting, study.seeds, spec)


def _run(study, name, setting, seeds, spec, swept=None):
    config = _valid(name, config_lib.override(study.entries[name], dict(setting)))
    budget = study.budget.get(name) if isinstance(study.budget, Mapping) else study.budget
    config = fit(config, spec, budget)
    config.seed, config.members.num = seeds.start, len(seeds)
    if swept:
        config.members.sweep = json.dumps(swept)
    return _valid(name, config)


def _valid(name, config):
    try:
        return config_lib.validated(config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def choose(
    study: Study, name: str, tried: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> dict[str, Any]:
    """Chooses an entry's setting, {field: value}, from pairs: what a run fixed, its `results.json`.

    It is the one with the fewest diverged seeds and, among those, the lowest mean validation loss;
    test scores are not used. The results of a run that diverged as a whole are {}.

    Raises UserError if all runs did.
    """
    ranked = []
    for fixed, results in tried:
        for each in _settings(results) if results else []:
            swept = {field: each[field] for field in study.select if field in each}
            loss = each["validation"]["loss"]["mean"]
            rank = each["diverged"], math.inf if loss is None else loss
            ranked.append((rank, {**fixed, **swept}))
    if not ranked:
        raise UserError(
            f"{name}: all networks diverged in every setting; select among smaller values of "
            "optimizer.learning_rate, in another --workdir"
        )
    setting = min(ranked, key=lambda pair: pair[0])[1]
    return {field: setting[field] for field in study.select}


def at_edges(study: Study, setting: Mapping[str, Any]) -> list[str]:
    """Returns the fields whose chosen value is the smallest or largest of three or more numbers."""

    def is_edge(field):
        values = study.select[field]
        numbers = [x for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
        return 2 < len(numbers) == len(values) and setting[field] in (min(values), max(values))

    return list(filter(is_edge, study.select))


def _settings(results):
    """The settings of a run; a run of one network is one setting of one seed."""
    if "settings" in results:
        return results["settings"]
    loss = results["validation"]["loss"] if results else None
    return [{"diverged": int(not results), "validation": {"loss": {"mean": loss}}}]


def flops_per_image(config: Config, spec: ImageSpec) -> int:
    """Counts the FLOPs of the matrix products that classify one image."""
    system = make_system(config, spec=spec)
    params = jax.eval_shape(lambda: init_state(config, system, 0)).params
    image = jax.ShapeDtypeStruct((1, *spec.shape), np.uint8)
    return profiling.product_flops(jax.make_jaxpr(system.apply)(params, image).jaxpr)


def widest(study: Study) -> Config:
    """Returns a configuration with as many members as the largest run, by which to set up JAX."""
    swept = (len(values) for field, values in study.select.items() if _can_be_swept(field, values))
    tried = len(study.selection_seeds) * math.prod(swept) if study.select else 0
    config, num = next(iter(study.entries.values())), max(len(study.seeds), tried)
    return config_lib.override(config, {"members.num": num})


def describe(
    study: Study,
    setting: Mapping[str, Any],
    tried: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    config: Config,
    results: Mapping[str, Any],
    spec: ImageSpec,
) -> dict[str, Any]:
    """Returns what `study.json` holds about an entry, nothing that depends on time or machine."""
    several = len(study.seeds) > 1
    scores = {
        f"{split}/{key}": results[split][key] if several else [results[split][key]]
        for split in ("validation", "test")
        for key in ("loss", "accuracy")
    }
    return {
        "network": describe_network(config.model),
        "dataset": results["dataset"]["name"],
        "hidden_size": config.model.hidden_size,
        "setting": dict(setting),
        "at_edge": at_edges(study, setting),
        "parameters": results["parameters"],
        "flops_per_image": flops_per_image(config, spec),
        "time_steps": results["sequence"]["time_steps"],
        "seeds": list(study.seeds),
        "diverged": sum(value is None for value in scores["test/accuracy"]),
        "scores": scores,
        **{name: members.statistics(values) for name, values in scores.items()},
        "tried": [
            {
                **fixed,
                **{key: each[key] for key in study.select if key in each},
                "diverged": each["diverged"],
                "validation": each["validation"],
            }
            for fixed, results in tried
            for each in _settings(results)
        ],
    }


def summarize(study: Study, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `study.json` holds: the plan, its entries and their differences."""
    scores = {name: entry["scores"]["test/accuracy"] for name, entry in entries.items()}
    return {
        "study": study.to_dict(),
        "entries": entries,
        "differences": compare.differences(scores),
    }
