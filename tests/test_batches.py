import jax
import numpy as np
import pytest

from seqmnist.errors import UserError
from seqmnist.training import batches, devices, keys


@pytest.mark.parametrize(
    ("num_train", "fraction", "train"), [(60000, 0.2, 48000), (4000, 0.2, 3200), (10, 0, 10)]
)
def test_validation_is_the_tail_of_the_training_archive(num_train, fraction, train):
    splits = batches.make_splits(num_train, 7, fraction)
    assert splits["train"] == range(train)
    assert splits["validation"] == range(train, num_train)
    assert splits["test"] == range(num_train, num_train + 7)


def test_refuses_to_leave_nothing_to_train_on():
    with pytest.raises(UserError, match="validation_fraction"):
        batches.make_splits(10, 5, 0.95)


def test_epoch_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    orders = [batches.epoch_order(seed, epoch, 500) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(500))
    assert len({bytes(np.asarray(order)) for order in orders}) == 4
    np.testing.assert_array_equal(orders[3], batches.epoch_order(1, 1, 500))
    for seed in (0, 2**32 - 1):
        expected = jax.random.permutation(keys.key(seed, "epoch_order", 3), 4000)
        np.testing.assert_array_equal(batches.epoch_order(seed, 3, 4000), expected)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 256])
def test_batches_hold_every_example_once(size):
    rows = np.asarray(batches.batch_rows(np.arange(size), 128))
    assert rows.shape == (batches.num_batches(size, 128), 128)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows[rows != batches.PADDING], np.arange(size))
    assert rows.size - size < 128


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_devices_share_what_is_joined(dtype):
    parts = [np.arange(n * 6, dtype=dtype).reshape(n, 2, 3) for n in (5, 2, 0)]
    joined = batches.join(parts)
    np.testing.assert_array_equal(joined, np.concatenate(parts))
    assert joined.dtype == dtype
    everywhere = jax.NamedSharding(devices.make_mesh(1, 2), jax.P())
    placed = devices.place(joined, everywhere)
    addresses = {shard.data.unsafe_buffer_pointer() for shard in placed.addressable_shards}
    assert addresses == {joined.ctypes.data}


@pytest.mark.parametrize("row", [[0, 99, 5], [100, 129, 101], [7, 128, 99], [-1, 100, 3]])
def test_records_read_either_archive_or_both(row, digits):
    images, labels = digits
    records = batches.Records((images[:100], labels[:100]), (images[100:], labels[100:]))
    batch, numbers = records.read(np.array([row])), np.maximum([row], 0)
    np.testing.assert_array_equal(batch.image, images[numbers])
    np.testing.assert_array_equal(batch.label, labels[numbers])
    np.testing.assert_array_equal(batch.mask, np.array([row]) >= 0)


@pytest.mark.slow
def test_stream_brings_what_take_gathers(digits):
    images, labels = digits
    records = batches.Records((images[:100], labels[:100]), (images[100:], labels[100:]))
    rows = batches.batch_rows(batches.epoch_order(0, 0, 130), 32)
    (window,) = batches.stream(records, rows, devices.make_mesh(1, 1))
    assert window.label.shape == (batches.WINDOW, 32)
    assert not window.mask[len(rows) :].any()
    parts = [jax.tree.map(lambda x, i=i: x[i], window) for i in range(len(rows))]
    for row, batch in zip(rows, parts, strict=True):
        expected = batches.take(jax.numpy.array(images), jax.numpy.array(labels), row)
        assert isinstance(batch.image, jax.Array)
        for got, want in zip(batch, expected, strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
    assert int(parts[-1].mask.sum()) == 2


@pytest.mark.parametrize("axis", [0, 1])
def test_chunks_change_nothing(axis):
    images, sizes = np.arange(11), []

    def double(x):
        sizes.append(len(x))
        return np.stack([x, 2 * x], 1 - axis)

    both = batches.in_chunks(double, images, most=4, axis=axis)
    assert sizes == [4, 4, 4]
    np.testing.assert_array_equal(both, double(images))
