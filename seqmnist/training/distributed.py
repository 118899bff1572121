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

from seqmnist.errors import UserError, one_line
from seqmnist.training import devices

# Seconds without a sign of life after which a process counts as dead.
PATIENCE = 20
# Seconds that all processes have to join.
JOINING = 60
_ENDING = threading.Lock()
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
    threading.Thread(target=_watch, args=[_job(), leaves], daemon=True).start()
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
                "processes of a job with the same command, in a --workdir that all of them see"
            )


def _job():
    """Returns what JAX knows of the job: `client`, `process_id`, `num_processes`.

    JAX has no public way to its processes' store, nor to these numbers before it has devices.
    """
    from jax._src.distributed import global_state

    return global_state


def _watch(job, leaves):
    """Tells the others once a second that this process lives, and ends it if one of them does not.

    A process that is stopped, or a host that is cut off, closes no connection: without this, the
    others would wait for it until JAX aborts them.
    """
    names, counts = [f"alive/{i}" for i in range(job.num_processes)], {}
    since, last = dict.fromkeys(names, time.monotonic()), time.monotonic()
    while True:
        alarm = threading.Timer(PATIENCE, _end, ["process 0 of this job does not answer"])
        alarm.daemon = True
        alarm.start()
        try:
            number = str(time.monotonic_ns())
            job.client.key_value_set(names[job.process_id], number, allow_overwrite=True)
            found = dict(job.client.key_value_dir_get("alive/"))
        except Exception as error:  # of the coordination service, of any kind
            if not leaves.is_set():
                _end(f"process 0 of this job cannot be reached ({one_line(error)[:200]})")
            return
        finally:
            alarm.cancel()
        now = time.monotonic()
        was_paused = now - last > PATIENCE / 4  # so that the others may have been, too
        changed = [name for name in names if was_paused or found.get(name) != counts.get(name)]
        since, counts, last = since | dict.fromkeys(changed, now), found, now
        silent = [name for name in names if now - since[name] > PATIENCE]
        if silent and not leaves.is_set():
            _end(f"process {silent[0].partition('/')[2]} of this job does not answer")
        time.sleep(1)


def _end(reason):
    _ENDING.acquire()  # for good: a second thread that comes here says nothing
    print(
        f"error: {reason}; run the job again, on any number of processes, to resume from its last "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )
    if _job().process_id == 0:
        time.sleep(2)  # so that the others, which it coordinates, can say why they end
    os._exit(1)  # a regular exit would wait for the process that is gone


def _give_up(coordinator):
    print(
        f"error: not all processes have joined at {coordinator or 'the coordinator'} within "
        f"{JOINING} seconds; see whether one ended with an error, and start all together",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
