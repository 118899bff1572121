"""Random networks, comparison relative to the size of what is compared, and what jaxprs hold."""

from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxprs_in_params

from seqmnist.study import images


def assert_close(got, expected, tolerance=1e-5):
    """Compares trees of arrays; `tolerance` is a share of the largest number of each array.

    It leaves room for another processor, which rounds differently.
    """

    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    chex.assert_trees_all_equal_structs(got, expected)
    jax.tree.map(compare, got, expected)


def product_dtypes(jaxpr: Any) -> Iterator[tuple[str, str, str]]:
    """Yields the dtypes of the factors and the result of all products with parameters."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][1][0]:
            yield tuple(str(x.aval.dtype) for x in (*eqn.invars, *eqn.outvars))
        for inner in jaxprs_in_params(eqn.params):
            yield from product_dtypes(inner)


def prepare(image, name, spec):
    """Returns the largest digit in an image, or the whole image, prepared."""
    found, largest = images.prepare_all(image, name, spec)
    return found[largest]


def random_params(shapes: Any, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """Returns random parameters, none of them zero: zeros could hide a mistake."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.array(rng.normal(0, 0.4, leaf.shape), dtype), shapes)


def random_module(build: Callable[[nnx.Rngs], nnx.Module], seed: int = 0) -> nnx.Module:
    """Returns the module that `build` makes, with `random_params`; compiles no initializer."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return nnx.merge(graphdef, random_params(shapes, seed))
