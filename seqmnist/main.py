"""The command line: flags -> configuration -> `run`.

Example:
  python -m seqmnist.main --workdir=runs/notebook --config=experiments/notebook.py
"""

import gc
import os
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from seqmnist import config as config_lib
from seqmnist import workdir as workdir_lib
from seqmnist.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files are.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "Train, or score what --workdir holds."
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Remove the run that --workdir holds, and start afresh."
)
_DEBUG_NANS = flags.DEFINE_bool(
    "debug_nans", False, "Name the operation that gives the first number that is not finite."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This is one process of several; SLURM, Open MPI, Kubernetes or a TPU pod tells which.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where nothing else tells; implies --distributed."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which this is, from 0.")


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake in it becomes one line."""
    for argument in argv[1:]:
        if override := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            config_lib.check_field_name(override[1])
        file = re.match(r"--?config=(.*)", argument)
        if file and not os.path.isfile(file[1]):
            raise UserError(f"--config={file[1]} is not a file; name an experiment's Python file")
    try:
        # Here, not above: ml_collections reads the command line as it defines the flag.
        config_flags.DEFINE_config_file(
            "config",
            config_lib.__file__,
            "An experiment: a Python file with a get_config(). Any field of it is overridden by "
            "--config.FIELD=VALUE, e.g. --config.train.num_epochs=1.",
        )
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error).partition("\n")[0]) from None
    except Exception as error:  # whatever the experiment's own code raises
        reason = str(error).partition("\n")[0]
        raise UserError(f"--config cannot be loaded: {type(error).__name__}: {reason}") from error
    if rest[1:]:
        raise UserError(f"{rest[1]!r} is not a flag; see --help")
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; say where the run's files go, --workdir=DIR")
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.FATAL)  # keep the libraries' diaries off the screen
    return rest


def _main(_) -> None:
    workdir = pathlib.Path(_WORKDIR.value).absolute()
    workdir_lib.check(workdir)
    config = _resolve_config(workdir)
    _check_distributed_flags()
    from seqmnist import distributed, run  # here, not above: --help and mistakes need no JAX

    gc.freeze()
    # Libraries that are imported later, and traced programs, stay as well: not every 700 objects.
    gc.set_threshold(100_000)
    gc.enable()
    with distributed.joined(
        _DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    ):
        if _MODE.value == "train":
            run.train(config, workdir, overwrite=_OVERWRITE.value, debug_nans=_DEBUG_NANS.value)
        else:
            run.evaluate(config, workdir)


def _resolve_config(workdir: pathlib.Path) -> config_lib.Config:
    """What --config says, or else what the workdir holds; then single fields over it."""
    from seqmnist import records

    flag = flags.FLAGS["config"]
    goes_on = _MODE.value == "train" and not _OVERWRITE.value
    goes_on = goes_on and flag.using_default_value and (workdir / records.CONFIG).is_file()
    if _MODE.value == "evaluate" or goes_on:
        values = config_dict.ConfigDict(config_lib.to_dict(records.read_config(workdir)))
        with values.ignore_type():  # from_dict checks the types
            values.update_from_flattened_dict(config_flags.get_override_values(flag))
        return config_lib.from_dict(values.to_dict())
    return config_lib.from_dict(flags.FLAGS.config.to_dict())


def _check_distributed_flags() -> None:
    given = [_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value]
    if any(value is not None for value in given):
        if None in given:
            raise UserError("--coordinator, --num_processes and --process_id go together")
        if not re.fullmatch(r".+:\d+", given[0]):
            raise UserError(f"--coordinator={given[0]} must be HOST:PORT, e.g. 127.0.0.1:8476")
        if not 0 <= given[2] < given[1]:
            raise UserError(
                f"--process_id={given[2]} must lie in [0, {given[1]}), as --num_processes says"
            )


def main() -> None:
    """Runs the command line; a user's mistake ends with one line and exit code 2."""
    # What start-up makes, it keeps: to look for garbage in it takes a tenth of a short run's
    # time, while modules are loaded and once more when the process ends.
    gc.disable()
    try:
        app.run(_main, flags_parser=_parse_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped before training began; nothing was lost", file=sys.stderr)
        sys.exit(130)
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
