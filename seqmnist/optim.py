"""Optimizers: configuration -> `optax.GradientTransformation`."""

import optax

from seqmnist.config import OptimizerConfig
from seqmnist.errors import choose


def rmsprop(learning_rate: float) -> optax.GradientTransformation:
    """RMSprop as Keras 3 computes it: decay 0.9, and epsilon 1e-7 inside the root."""
    return optax.rmsprop(learning_rate, decay=0.9, eps=1e-7, eps_in_sqrt=True)


OPTIMIZERS = {"rmsprop": rmsprop}


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds the optimizer that the configuration names.

    Raises:
      UserError: there is no optimizer of that name.
    """
    return choose(OPTIMIZERS, config.name, "optimizer.name")(config.learning_rate)
