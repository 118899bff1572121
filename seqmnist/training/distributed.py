"""Several processes that run one job together, each with devices of its own."""

import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Iterator

import jax

from seqmnist.errors import UserError, one_line

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
            heartbeat_timeout_seconds=PATIENCE,
        )
    except (ValueError, RuntimeError) as error:  # jax.errors.JaxRuntimeError among them
        raise UserError(
            f"cannot join the other processes ({one_line(error)[:300]}); give "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from error
    finally:
        alarm.cancel()
    faulthandler.disable()  # where JAX itself ends this process, its message is enough
    try:
        yield
    except UserError:
        if jax.process_index() == 0:
            time.sleep(2)  # so that the others, which it coordinates, can say why they end
        raise
    except (RuntimeError, ValueError) as error:  # what JAX and Orbax raise if one is gone
        if not _GONE.search(str(error)):
            raise
        print(
            f"error: another process of this job has ended or cannot be reached "
            f"({one_line(error)[:200]}); run the job again, on any number of processes, to resume "
            "from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # a regular exit would wait for the process that is gone
    jax.distributed.shutdown()


def _give_up(coordinator):
    print(
        f"error: not all processes have joined at {coordinator or 'the coordinator'} within "
        f"{JOINING} seconds; see whether one ended with an error, and start all together",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
