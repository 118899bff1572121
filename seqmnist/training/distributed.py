"""Several processes that run one job together, each with devices of its own."""

import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src.distributed import global_state  # JAX has no public way to its processes' store

from seqmnist.errors import UserError, one_line
from seqmnist.training import devices

# Seconds without a sign of life after which a process counts as dead.
PATIENCE = 20
# Seconds that all processes have to join.
JOINING = 60
# What JAX, gloo and the coordination service say when another process is gone.
_GONE = re.compile(
    r"gloo|heartbeat|coordination (service|agent)|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|connection (reset|closed|refused)",
    re.I,
)


@contextlib.contextmanager
def joined(
    is_distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Joins the job, and leaves it at the end; does nothing for a job of one process.

    `coordinator` is HOST:PORT of process 0. If it is None and `is_distributed`, the environment is
    asked: SLURM, Open MPI, Kubernetes, TPU pods. When another process of the job dies, this one
    says so and ends. Raises UserError if the environment does not describe the job, or if the
    coordinator cannot be reached.
    """
    if not is_distributed and coordinator is None:
        yield
        return
    host, _, _ = (coordinator or "").rpartition(":")
    is_local = host in ("127.0.0.1", "localhost", "[::1]")
    # It ends the process in one line, before JAX gives up, which would abort it.
    alarm = threading.Timer(JOINING, _give_up, [coordinator])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            coordinator_bind_address=coordinator if is_local else None,
            initialization_timeout=JOINING + 60,
            heartbeat_timeout_seconds=3 * PATIENCE,  # it would abort; `_watch` is first
        )
    except (ValueError, RuntimeError) as error:  # jax.errors.JaxRuntimeError among them
        raise UserError(
            f"cannot join the other processes ({one_line(error)[:300]}); give "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from error
    finally:
        alarm.cancel()
    faulthandler.disable()  # where JAX itself ends this process, its message is enough
    leaves = threading.Event()
    watch = threading.Thread(target=_watch, args=[global_state.client, leaves], daemon=True)
    watch.start()
    try:
        yield
    except UserError:
        if jax.process_index() == 0:
            time.sleep(2)  # so that the others, which it coordinates, can say why they end
        raise
    except (RuntimeError, ValueError) as error:  # what JAX and Orbax raise if one is gone
        if not _GONE.search(str(error)):
            raise
        reason = one_line(error)[:200]
        _end(f"another process of this job has ended or cannot be reached ({reason})")
    finally:
        leaves.set()
    jax.distributed.shutdown()  # waits for the others


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises UserError in all processes of a job, naming the first fact that differs among them."""
    if devices.is_same(repr(facts)):
        return
    for name, value in facts.items():
        if not devices.is_same(repr((name, value))):
            raise UserError(
                f"{name} is {value} in this process, and something else in another; start all "
                "processes of a job with the same command"
            )


def _watch(client, leaves):
    """Tells the others once a second that this process lives, and ends it if one of them does not.

    A process that is stopped, or a host that is cut off, closes no connection: without this, the
    others would wait for it until JAX aborts them.
    """
    own, counts, since = f"alive/{jax.process_index()}", {}, {}
    while True:
        alarm = threading.Timer(PATIENCE, _end, ["process 0 of this job does not answer"])
        alarm.daemon = True
        alarm.start()
        try:
            client.key_value_set(own, str(time.monotonic_ns()), allow_overwrite=True)
            found = dict(client.key_value_dir_get("alive/"))
        except Exception as error:  # of the coordination service, of any kind
            if not leaves.is_set():
                _end(f"process 0 of this job cannot be reached ({one_line(error)[:200]})")
            return
        finally:
            alarm.cancel()
        since |= {name: time.monotonic() for name in found if found[name] != counts.get(name)}
        counts = found
        silent = [name for name in since if time.monotonic() - since[name] > PATIENCE]
        if silent and not leaves.is_set():
            _end(f"process {silent[0].partition('/')[2]} of this job does not answer")
        time.sleep(1)


def _end(reason):
    print(
        f"error: {reason}; run the job again, on any number of processes, to resume from its last "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # a regular exit would wait for the process that is gone


def _give_up(coordinator):
    print(
        f"error: not all processes have joined at {coordinator or 'the coordinator'} within "
        f"{JOINING} seconds; see whether one ended with an error, and start all together",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
