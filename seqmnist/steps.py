"""One step of training and of evaluation: pure functions, no jit, no I/O."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from seqmnist import keys
from seqmnist.config import Config
from seqmnist.data import Batch
from seqmnist.metrics import Sums, classification_sums
from seqmnist.model import SequenceClassifier
from seqmnist.optim import make_optimizer


class TrainState(NamedTuple):
    """All that changes while a run trains: vmapped, sharded, donated and saved whole.

    Attributes:
      params: the model's parameters, an `nnx.State`.
      opt_state: the optimizer's state.
      step: int32, updates taken so far.
    """

    params: Any
    opt_state: optax.OptState
    step: jax.Array


class System(NamedTuple):
    """All that stays: the structure of the network and the rule of its updates.

    Attributes:
      graphdef: the model without its parameters.
      optimizer: the gradient transformation.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation

    def apply(self, params: Any, images: jax.Array) -> jax.Array:
        """Returns logits [B, C] for images uint8 [B, 28, 28]."""
        return nnx.merge(self.graphdef, params)(images)


def make_system(config: Config) -> System:
    """Builds the fixed half of a run; allocates nothing.

    Raises:
      UserError: the configuration names a view, cell or optimizer that does not exist.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: _make_model(config, seed=0)))
    return System(graphdef, make_optimizer(config.optimizer))


def init_state(config: Config, system: System, seed: jax.Array) -> TrainState:
    """Builds the changing half of a run, a pure function of its seed.

    Args:
      config: the configuration.
      system: the fixed half.
      seed: an integer scalar.
    """
    params = nnx.state(_make_model(config, seed))
    return TrainState(params, system.optimizer.init(params), jnp.zeros((), jnp.int32))


def train_step(system: System, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
    """Takes one update on the mean loss of a batch.

    Args:
      system: the fixed half.
      state: before the update.
      batch: image uint8 [B, 28, 28], label int32 [B], mask bool [B].

    Returns:
      The state after the update, and the sums of the batch before it.
    """

    def mean_loss(params):
        sums = classification_sums(system.apply(params, batch.image), batch.label, batch.mask)
        return sums.loss / sums.count.astype(sums.loss.dtype), sums

    grads, sums = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = system.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, state.step + 1), sums


def eval_step(system: System, params: Any, batch: Batch) -> Sums:
    """Returns the sums of a batch, as `train_step` takes it."""
    return classification_sums(system.apply(params, batch.image), batch.label, batch.mask)


def _make_model(config: Config, seed: jax.Array | int) -> SequenceClassifier:
    return SequenceClassifier(config.model, rngs=nnx.Rngs(params=keys.key(seed, "params")))
