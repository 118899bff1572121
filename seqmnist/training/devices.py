"""Meshes: how members and batches spread over devices and processes.

A mesh has two axes: `member`, over which independent runs spread without communication, and
`data`, over which a batch is split and its gradient summed once per step. A process is one of
the programs that run a job together, each with devices of its own.
"""

import collections
import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import NamedSharding, P, lax
from jax.experimental import mesh_utils, multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from seqmnist.config import MeshConfig
from seqmnist.errors import UserError

# Where a device trains its members one after the other. A CPU core loses by a batch of small
# products over one product at a time; an accelerator gains.
_ONE_BY_ONE = ("cpu",)

# No batch is split further than this. On two CPU cores, halves of 64 examples train 1.6 times as
# fast as the whole on one device, whose threads leave the second core nearly idle between such
# small products (SimpleRNN, GRU and LSTM alike). More than two have not been measured.
_LEAST_BATCH_OF_CPUS, _LEAST_BATCH_OF_ACCELERATORS = 64, 128


def num_useful_cores(num_members: int, batch_size: int) -> int:
    """Returns over how many CPU cores members, or the batch of a single run, are worth spreading.

    Each of several processes computes its share of a single run's batch on one device.
    """
    if num_members > 1 or jax.distributed.is_initialized():
        return num_members
    return batch_size // _LEAST_BATCH_OF_CPUS


def mesh_shape(
    config: MeshConfig, num_members: int, batch_size: int, devices: Sequence[jax.Device]
) -> list[int]:
    """Chooses the shape of a mesh: [devices along `member`, devices along `data`].

    Members spread as far as they can, a batch over what they leave. `devices` are those of all
    processes. Raises UserError if what is asked for does not divide evenly or needs more devices,
    or if several processes cannot use all their devices.
    """
    num_devices, num_processes = len(devices), len({each.process_index for each in devices})
    for name, number, size, what in (
        ("member", config.member, num_members, "members"),
        ("data", config.data, batch_size, "examples of a batch"),
    ):
        if number and size % number:
            choices = ", ".join(str(n) for n in _divisors(size) if n <= num_devices)
            raise UserError(
                f"config.mesh.{name}={number} does not divide the {size} {what}; choose one of "
                f"{choices}"
            )
    members = [config.member] if config.member else _divisors(num_members)
    parts = [config.data] if config.data else _divisors(batch_size)
    shapes = [[m, d] for m in members for d in parts if m * d <= num_devices]
    if not shapes:
        member, data = members[0], parts[0]
        raise UserError(
            f"a mesh of {member} × {data} needs {member * data} devices, and there are "
            f"{num_devices}; make config.mesh.member or config.mesh.data smaller"
        )
    if num_processes == 1:
        is_cpu = devices[0].platform == "cpu"
        least = _LEAST_BATCH_OF_CPUS if is_cpu else _LEAST_BATCH_OF_ACCELERATORS
        return max([m, d] for m, d in shapes if d == parts[0] or batch_size >= d * least)
    # Several processes must use all their devices.
    complete = [[m, d] for m, d in shapes if m * d == num_devices]
    if not complete:
        member, data = max(shapes)
        raise UserError(
            f"a mesh of {member} × {data} leaves some of the {num_devices} devices of "
            f"{num_processes} processes idle; change config.members.num, "
            "config.train.batch_size or the number of processes"
        )
    return max(complete)


def make_mesh(num_members: int, num_data: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the first devices as a mesh ("member", "data"); ValueError if there are too few.

    The devices are JAX's, or `devices`, which may be only described.
    """
    devices, shape = devices or jax.devices(), (num_members, num_data)
    num = math.prod(shape)
    if num == len(devices):  # neighbours in the mesh are neighbours in the machine
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:  # which `mesh_utils` refuses where the first chips of a TPU do not fill a rectangle
        grid = np.reshape(devices[:num], shape)
    return Mesh(grid, ("member", "data"))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Places arrays on a mesh. Every process gives the whole arrays, and keeps its part of them."""

    def put(x):
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        # From the host: an array of one device cannot become one of several processes.
        return jax.device_put(np.asarray(x), sharding)

    return jax.tree.map(put, tree)


def placed_shapes(tree: Any, sharding: NamedSharding) -> Any:
    """Returns the shapes, dtypes and shardings that `place` gives arrays, and places nothing."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def local_columns(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns which examples of each batch [B] the devices of this process hold, in order."""
    parts = NamedSharding(mesh, P("data")).addressable_devices_indices_map((batch_size,))
    return np.unique([np.arange(batch_size)[part] for part in parts.values()])


def gather(tree: Any) -> Any:
    """Returns arrays as NumPy's, whole, on every process."""

    def whole(x):
        if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def collect(number: int) -> list[int]:
    """Returns the numbers, below 2³¹, that all processes give, in their order.

    Raises UserError if the processes have different numbers of devices, as JAX forbids here.
    """
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise UserError(
            f"the processes of this job have {sorted(counts.values())} devices; give all of them "
            "the same configuration and the same number of devices"
        )
    return multihost_utils.process_allgather(np.int32(number)).tolist()


def is_same(text: str) -> bool:
    """Returns whether all processes give the same text."""
    return len(set(collect(int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)))) == 1


def agree(number: int) -> int:
    """Returns the largest of the numbers that all processes give."""
    return max(collect(number))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Lets a block that raises UserError in one process raise it in all."""
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    if agree(failure is not None):
        raise failure or UserError(
            "another process of this job ended with an error; correct what its line says"
        )


def over_mesh(
    function: Callable,
    mesh: Mesh,
    member_specs: Sequence[P],
    shared_specs: Sequence[P],
    out_specs: P,
    has_members: bool,
) -> Callable:
    """Lifts a function of one run, on its device's part of each batch, to all runs and batches.

    The function takes arguments of each member, then those that all members share; it may reduce
    over the mesh axis "data". The specs say how each argument and the results, which are a
    member's, are split, e.g. P("data"). With members, a member's arguments and results have a
    leading axis S, which spreads over "member".
    """

    def of_local_members(*arguments):
        local, common = arguments[: len(member_specs)], arguments[len(member_specs) :]
        num_here = len(jax.tree.leaves(local)[0])
        if num_here == 1:  # by XLA's estimate, one more axis makes a TPU's step 2.5 times as long
            results = function(*jax.tree.map(lambda x: x[0], local), *common)
            return jax.tree.map(lambda x: x[None], results)
        at_once = None if mesh.devices.flat[0].platform in _ONE_BY_ONE else num_here
        return lax.map(lambda one: function(*one, *common), local, batch_size=at_once)

    if has_members:
        member_specs = [P("member", *spec) for spec in member_specs]
        out_specs = P("member", *out_specs)
    return jax.shard_map(
        of_local_members if has_members else function,
        mesh=mesh,
        in_specs=(*member_specs, *shared_specs),
        out_specs=out_specs,
        check_vma=False,
    )


def add_up(tree: Any, axis: str | None) -> Any:
    """Sums arrays over the devices of a mesh axis, inside `over_mesh`; None leaves them alone.

    Reduces one flat array of floats, since each all-reduce is a synchronization point. Integers
    stay exact up to 2²⁴.
    """
    if axis is None:
        return tree
    with jax.numpy_dtype_promotion("standard"):
        flat, unravel = ravel_pytree(tree)
    return unravel(lax.psum(flat, axis))


def _divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]
