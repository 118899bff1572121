"""The command line: flags -> configuration -> `run`.

Example:
  python -m seqmnist.main --workdir=runs/notebook --config=experiments/notebook.py
"""

import os
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from seqmnist import config as config_lib
from seqmnist.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files are.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate"], "Train, or score what --workdir holds."
)


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
        logging.set_verbosity(logging.WARNING)  # keep the libraries' diaries off the screen
    return rest


def _main(_) -> None:
    workdir = pathlib.Path(_WORKDIR.value).absolute()
    from seqmnist import records, run  # here, not above: --help and mistakes need no JAX

    if _MODE.value == "train":
        run.train(config_lib.from_dict(flags.FLAGS.config.to_dict()), workdir)
    else:
        values = config_dict.ConfigDict(config_lib.to_dict(records.read_config(workdir)))
        values.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS["config"]))
        run.evaluate(config_lib.from_dict(values.to_dict()), workdir)


def main() -> None:
    """Runs the command line; a user's mistake ends with one line and exit code 2."""
    try:
        app.run(_main, flags_parser=_parse_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
