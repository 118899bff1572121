"""One step of training and of evaluation, and the system that a configuration describes.

The steps are pure functions, not yet compiled; `check_names` imports the plugins.
"""

import contextlib
import functools
import textwrap
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.errors import ConcretizationTypeError, TracerArrayConversionError
from jax.flatten_util import ravel_pytree

from seqmnist.config import LARGEST, Config, get, load_plugins, option_group, override, plugin_names
from seqmnist.datasets.sources import LOADERS, READERS
from seqmnist.errors import UserError, choose, one_line
from seqmnist.networks import views
from seqmnist.networks.cells import CELLS
from seqmnist.networks.model import READOUTS, SequenceClassifier, make_cell
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.training import devices, keys, members
from seqmnist.training.augment import AUGMENTATIONS
from seqmnist.training.batches import Batch, shapes
from seqmnist.training.metrics import Sums, classification_sums
from seqmnist.training.optim import OPTIMIZERS, hyperparameter, make_optimizer


class TrainState(NamedTuple):
    """All that changes while a run trains: vmapped, sharded, donated and saved whole."""

    params: Any  # the model's parameters, an `nnx.State`
    opt_state: optax.OptState
    step: jax.Array  # int32, updates taken so far
    seed: jax.Array  # uint32, the source of all the run's randomness; never changes


class System(NamedTuple):
    """All that stays the same: the structure of the network and the rule of its updates."""

    spec: ImageSpec  # of the images that it reads
    graphdef: nnx.GraphDef  # the model without its parameters
    optimizer: optax.GradientTransformation
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None  # (images, a key for each)
    drops_out: bool  # whether training drops outputs of layers
    truncate: int  # time steps after which gradients stop; 0 is never
    accumulate: int  # parts of a batch whose gradients are added up one after the other

    def apply(
        self,
        params: Any,
        images: jax.Array,
        dropout_keys: jax.Array | None = None,
        truncate: int = 0,
    ) -> jax.Array:
        """Returns logits [B, C] for images uint8 [B, *spec.shape].

        Without `dropout_keys` [B], no dropout. Gradients stop after every `truncate` time steps,
        not if it is 0.
        """
        return nnx.merge(self.graphdef, params)(images, dropout_keys, truncate)


def make_system(config: Config, num_steps: int | None = None, spec: ImageSpec = MNIST) -> System:
    """Builds the fixed half of a run; allocates nothing.

    `num_steps` is the length of the run, for schedules; without it the learning rate is constant.
    Raises UserError if the configuration names a view, cell, optimizer… that does not exist, or
    that does not fit the images.
    """
    check_names(config)
    with _explain_plugins(config) as is_needed:
        system = _make_system(config, num_steps, spec)
        if is_needed:  # what the library's parts do is tested; this traces a step of training
            batch = shapes((config.train.accumulate,), spec.shape)
            jax.eval_shape(lambda x: train_step(system, init_state(config, system, 0), x), batch)
    return system


_TABLES = {
    "data.name": (LOADERS, READERS),
    "model.view": (views.VIEWS,),
    "model.cell": (CELLS,),
    "model.readout": (READOUTS,),
    "optimizer.name": (OPTIMIZERS,),
    "train.augment": (AUGMENTATIONS,),
}


def own_choices(config: Config) -> dict[str, str]:
    """Returns what a user added of what the configuration names: {field: "config.FIELD=NAME"}."""
    return {
        field: f"config.{field}={name}"
        for field, tables in _TABLES.items()
        if any(table.is_own(name := get(config, field)) for table in tables)
    }


@contextlib.contextmanager
def _explain_plugins(config):
    """Turns an error of what a user added into one line; yields whether any of it is used."""
    own = [text for field, text in own_choices(config).items() if field != "data.name"]
    try:
        yield bool(own)
    except Exception as error:
        if not own or isinstance(error, UserError):
            raise
        what, files = ", ".join(own), plugin_names(config)
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename in files:
                what = f"{frame.filename}, line {frame.lineno}"
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{what}: {textwrap.shorten(reason, 300)}; correct the plugin") from error


def _make_system(config, num_steps, spec):
    swept = members.settings(config)[0]
    steps_per_epoch = (num_steps or 1) // config.train.num_epochs
    optimizer = make_optimizer(
        config.optimizer, num_steps, _of("optimizer", swept), max(1, steps_per_epoch)
    )
    graphdef = _make_graphdef(config, spec, _of("model", swept))
    augment = AUGMENTATIONS[config.train.augment]
    drops_out, train = config.model.dropout > 0, config.train
    return System(spec, graphdef, optimizer, augment, drops_out, train.truncate, train.accumulate)


def check_names(config: Config) -> None:
    """Imports the plugins; raises UserError if a name or an option does not exist.

    No images are needed for this.
    """
    load_plugins(config)
    views.find(config.model.view)
    choose(READOUTS, config.model.readout, "model.readout")
    choose(AUGMENTATIONS, config.train.augment, "train.augment")
    with _explain_plugins(config):
        _check_options(config)


def _check_options(config):
    settings = members.settings(config)
    swept = {name: np.float32(value) for name, value in settings[0].items()}
    make_cell(config.model, _options(_of("model", swept)))
    for setting in settings if any(map(option_group, settings[0])) else settings[:1]:
        one = override(config, setting)
        make_cell(one.model)
        make_optimizer(one.optimizer)


def init_state(
    config: Config, system: System, seed: jax.Array, settings: Mapping[str, jax.Array] | None = None
) -> TrainState:
    """Builds the changing half of a run, a pure function of its seed, an integer scalar.

    `settings` of a sweep are float scalars by field, e.g. "optimizer.learning_rate".
    """
    settings = settings or members.settings(config)[0]
    params = nnx.state(_make_model(config, system.spec, seed, _of("model", settings)))
    opt_state = system.optimizer.init(nnx.filter_state(params, nnx.Param))
    if optax.tree.get(opt_state, "best_value") is not None:  # `guarded_step` refuses Optax's inf
        opt_state = optax.tree.set(opt_state, best_value=jnp.float32(LARGEST))
    if own := _of("optimizer", settings):
        values = {hyperparameter(name): value for name, value in own.items()}
        opt_state = opt_state._replace(hyperparams={**opt_state.hyperparams, **values})
    state = TrainState(params, opt_state, jnp.zeros((), jnp.int32), jnp.asarray(seed, jnp.uint32))
    # Numbers of Python leave weak types, for which the training program would compile once more.
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)


def train_step(
    system: System, state: TrainState, batch: Batch, axis: str | None = None
) -> tuple[TrainState, Sums]:
    """Takes one update on the mean loss of a batch; also returns the batch's sums before it.

    The sums are scalars, their norms those of the mean loss's gradient, before it is clipped, and
    of the update. `train.accumulate` must divide B. Inside `devices.over_mesh`, `batch` is this
    device's part of a batch that is split over the mesh axis `axis`; the update and the sums are
    those of the whole batch.
    """

    def draw_keys(purpose):
        """Draws a key for each position in the whole batch; a part of it gets the same keys."""
        size = len(batch.label)
        first = 0 if axis is None else lax.axis_index(axis) * size
        positions = first + jnp.arange(size, dtype=jnp.int32)
        key = keys.key(state.seed, purpose, state.step)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)

    def total_loss(trained, batch, augment_keys, dropout_keys):
        images = batch.image
        if system.augment:
            images = system.augment(images, augment_keys)
        params = nnx.merge_state(trained, constants)
        logits = system.apply(params, images, dropout_keys, system.truncate)
        with jax.named_scope("loss"):
            sums = classification_sums(logits, batch.label, batch.mask)
        return sums.loss, sums

    trained, constants = nnx.split_state(state.params, nnx.Param, ...)
    augment_keys = draw_keys("augment") if system.augment else None
    dropout_keys = draw_keys("dropout") if system.drops_out else None
    part_of = functools.partial(jax.grad(total_loss, has_aux=True), trained)
    grads, sums = _summed(part_of, (batch, augment_keys, dropout_keys), system.accumulate)
    grads, examples = devices.add_up((grads, sums[:3]), axis)  # norms are those of the whole
    sums = Sums(*examples, *sums[3:])
    with jax.named_scope("optimizer"):
        grads = jax.tree.map(lambda grad: grad / sums.count.astype(grad.dtype), grads)
        loss = sums.loss / sums.count.astype(sums.loss.dtype)
        updates, opt_state = system.optimizer.update(grads, state.opt_state, trained, value=loss)
        params = nnx.merge_state(optax.apply_updates(trained, updates), constants)
        gradient_norm, update_norm = _norm(grads), _norm(updates)
        sums = sums._replace(gradient_norm=gradient_norm, update_norm=update_norm)
    return TrainState(params, opt_state, state.step + 1, state.seed), sums


def guarded_step(
    system: System, state: TrainState, sums: Sums, batch: Batch, axis: str | None = None
) -> tuple[TrainState, Sums, Sums]:
    """Takes a `train_step` and adds to the sums, unless something in it is not finite.

    From such a step on, the state stays as it was before it, and the summed loss is NaN: the last
    good state is kept, and tells later at which step the run went wrong. The optimizer's state
    counts too: with an infinite second moment, parameters stay finite and never move again.
    A summed loss of infinity, which marks a network that has stopped early, stays.

    Returns the state, the sums, and the sums of this step alone, marked in the same way.
    """
    after, batch_sums = train_step(system, state, batch, axis)
    before, sums = sums.loss, sums + batch_sums
    leaves = jax.tree.leaves((sums.loss, after.params, after.opt_state))
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    is_finite = jnp.isfinite(ravel_pytree(floats)[0]).all()
    state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state)
    loss = jnp.where(is_finite | jnp.isinf(before), sums.loss, jnp.nan)
    last = batch_sums._replace(loss=jnp.where(jnp.isfinite(loss), batch_sums.loss, loss))
    return state, sums._replace(loss=loss), last


def eval_step(system: System, params: Any, batch: Batch) -> Sums:
    """Returns the sums of a batch, as `train_step` takes it."""
    return classification_sums(system.apply(params, batch.image), batch.label, batch.mask)


def _summed(function, arguments, num_parts):
    """Returns `function` of arguments whose arrays are [B, …], or its sum over parts of them."""
    if num_parts == 1:
        return function(*arguments)
    parts = jax.tree.map(lambda x: x.reshape(num_parts, -1, *x.shape[1:]), arguments)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    return lax.scan(add, zeros, parts)[0]


def _norm(tree):
    """Returns the L2 norm of all leaves, joined: 52 leaves, one by one, compile 4 times as long."""
    return jnp.linalg.norm(ravel_pytree(tree)[0])


def _make_model(config, spec, seed, settings) -> SequenceClassifier:
    rngs = nnx.Rngs(params=keys.key(seed, "params"))
    return SequenceClassifier(config.model, spec, rngs=rngs, cell_options=_options(settings))


def _make_graphdef(config, spec, settings):
    """Returns the structure of a network, which must be the same for all settings."""
    try:
        values = {name: jnp.float32(value) for name, value in settings.items()}
        model = nnx.eval_shape(lambda values: _make_model(config, spec, 0, values), values)
    except (ConcretizationTypeError, TracerArrayConversionError) as error:
        if not settings:
            raise
        raise UserError(
            f"config.members.sweep: {config.model.cell} cannot be built for several values of "
            f"{', '.join(settings)}; its __init__ must use JAX's functions only"
        ) from error
    for _, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, jax.core.Tracer):
                raise UserError(
                    f"config.model.cell={config.model.cell}: the attribute `{name}` of "
                    f"{type(module).__name__} is an array; keep it as an nnx.Param, or as a "
                    "cells.Constant if it is not trained"
                )
    return nnx.graphdef(model)


def _options(settings):
    return {name.rpartition(".")[2]: value for name, value in settings.items()}


def _of(group, settings):
    """Returns those of the settings that belong to a group of the configuration."""
    return {name: value for name, value in settings.items() if name.startswith(f"{group}.")}
