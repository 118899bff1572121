import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmnist.config import Config, ModelConfig
from seqmnist.errors import UserError
from seqmnist.model import SequenceClassifier
from seqmnist.steps import init_state, make_system


def count(config):
    model = nnx.eval_shape(lambda: SequenceClassifier(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


def test_the_notebook_has_6602_parameters():
    assert count(ModelConfig()) == 6602


def test_a_second_layer_reads_the_first():
    assert count(ModelConfig(num_layers=2)) == 6602 + 64 * (64 + 64 + 1)


@pytest.mark.parametrize("field", ["view", "cell"])
def test_an_unknown_name_is_refused_with_the_choices(field):
    with pytest.raises(UserError, match=f"config.model.{field}='nothing'.*choose one of"):
        make_system(Config(model=ModelConfig(**{field: "nothing"})))


class LogitsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_logits_equal_a_float64_loop(self):
        system = make_system(Config())
        params = init_state(Config(), system, 0).params
        images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
        logits = self.variant(system.apply)(params, jnp.array(images))
        chex.assert_shape(logits, (4, 10))
        chex.assert_type(logits, jnp.float32)

        cell = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))
        layer, readout = cell["layers"][0], cell["readout"]
        h = np.zeros((4, 64))
        for t in range(28):
            h = np.tanh(
                images[:, t] / 255 @ layer["kernel"] + layer["bias"] + h @ layer["recurrent_kernel"]
            )
        np.testing.assert_allclose(logits, h @ readout["kernel"] + readout["bias"], atol=1e-5)


def test_it_computes_in_the_dtype_of_its_parameters():
    with jax.enable_x64(True):
        system = make_system(Config())
        params = init_state(Config(), system, 0).params
        double = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        assert system.apply(double, jnp.zeros((1, 28, 28), jnp.uint8)).dtype == jnp.float64
