import chex
import jax
import jax.numpy as jnp
import numpy as np

from seqmnist.config import Config
from seqmnist.training import batches
from seqmnist.training.steps import eval_step, init_state, make_system, train_step

CONFIG = Config()
GOLDEN_LOSS = 2.5023


def batch_of(digits, size, rows=None):
    images, labels = (jnp.array(x) for x in digits)
    return batches.take(images, labels, batches.batch_rows(np.arange(size), rows or size)[0])


def test_a_run_is_a_function_of_its_seed():
    system = make_system(CONFIG)
    zero, again, one = (init_state(CONFIG, system, seed) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(zero, again)
    kernel = [state.params["layers"][0]["recurrent_kernel"][...] for state in (zero, one)]
    assert not np.allclose(*kernel)


def test_padding_leaves_the_update_alone(digits):
    system = make_system(CONFIG)
    state = init_state(CONFIG, system, 0)
    exact, sums = train_step(system, state, batch_of(digits, 20))
    padded, padded_sums = train_step(system, state, batch_of(digits, 20, rows=32))
    chex.assert_trees_all_close(exact, padded, atol=1e-5)
    chex.assert_trees_all_close(sums, padded_sums, rtol=1e-6)
    assert int(padded_sums.count) == 20


def test_the_first_loss_is_what_it_was(digits):
    system = make_system(CONFIG)
    sums = eval_step(system, init_state(CONFIG, system, 0).params, batch_of(digits, 130))
    assert abs(sums.means()["loss"] - GOLDEN_LOSS) < 1e-4, (
        "Initialization, normalization or the loss has changed. If that was meant, every "
        "published figure changes with it: rerun the experiments, then set GOLDEN_LOSS."
    )


class TrainStepTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_loss_falls_and_the_step_counts(self):
        rng = np.random.default_rng(0)
        labels = np.arange(40, dtype=np.int32) % 10
        images = np.zeros((40, 28, 28), np.uint8)
        images[np.arange(40), :, labels] = 255
        images[:, 0] = rng.integers(0, 255, (40, 28))
        batch = batch_of((images, labels), 40)
        system = make_system(CONFIG)
        state = init_state(CONFIG, system, 0)
        step = self.variant(lambda state, batch: train_step(system, state, batch))
        losses = []
        for i in range(10):
            assert int(state.step) == i
            state, sums = step(state, batch)
            losses.append(sums.means()["loss"])
        assert losses[-1] < 0.7 * losses[0]


def test_gradients_equal_finite_differences(digits):
    with jax.enable_x64(True):
        system = make_system(CONFIG)
        params = init_state(CONFIG, system, 0).params
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        batch = batch_of(digits, 8)

        def loss(params):
            return eval_step(system, params, batch).loss

        jax.test_util.check_grads(loss, (params,), order=1, modes=["rev"], eps=1e-6)
