"""Meshes: how members and batches spread over devices.

A mesh has two axes: `member`, over which independent runs spread without communication, and
`data`, over which a batch is split and its gradient reduced.
"""

from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqmnist.errors import UserError

# Members that one device trains at the same time. A CPU core gains nothing from a batch of small
# products over one product; an accelerator does.
_AT_ONCE = {"cpu": 1}


def make_mesh(num_members: int, num_data: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices, by default the first ones, as a mesh ("member", "data").

    Raises:
      UserError: there are too few devices.
    """
    devices = list(devices or jax.devices())
    wanted = num_members * num_data
    if wanted > len(devices):
        raise UserError(
            f"a mesh of {num_members} × {num_data} needs {wanted} devices; there are {len(devices)}"
        )
    return jax.make_mesh(
        (num_members, num_data),
        ("member", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[:wanted],
    )


def spread(mesh: Mesh, tree, *axes: str | None):
    """Places arrays on a mesh, their leading axes split over the named axes of it."""
    return jax.device_put(tree, NamedSharding(mesh, P(*axes)))


def over_members(function: Callable, mesh: Mesh, num_shared: int) -> Callable:
    """Lifts a function of one member to a function of all.

    Args:
      function: (its own arguments..., shared arguments...) -> results.
      mesh: where; members split evenly over its `member` axis.
      num_shared: how many of the last arguments all members share.

    Returns:
      The same function, with a leading axis S on its own arguments and on its results.
    """
    at_once = _AT_ONCE.get(mesh.devices.flat[0].platform)

    def of_local_members(*arguments):
        own, shared = arguments[: len(arguments) - num_shared], arguments[-num_shared:]
        num_local = len(jax.tree.leaves(own)[0])
        return lax.map(
            lambda one: function(*one, *shared),
            own,
            batch_size=min(at_once or num_local, num_local),
        )

    def of_all_members(*arguments):
        num_own = len(arguments) - num_shared
        return jax.shard_map(
            of_local_members,
            mesh=mesh,
            in_specs=(P("member"),) * num_own + (P(),) * num_shared,
            out_specs=P("member"),
            axis_names={"member"},
            check_vma=False,
        )(*arguments)

    return of_all_members
