"""Trains a network that reads images as sequences, or resumes a run.

Example:
  python -m seqmnist.main --workdir=runs/a --config=experiments/notebook.py
  python -m seqmnist.main --workdir=runs/b --config.model.cell=gru
"""

import argparse
import difflib
import functools
import json
import re
import sys
from collections.abc import Sequence

import seqmnist
from seqmnist import config as config_lib
from seqmnist import paths, process
from seqmnist.errors import UserError
from seqmnist.stop import StopRequest


def make_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Returns the parser; its result lacks the fields of `Config` that are not given.

    Options, such as `--config.model.cell_options.NAME`, are accepted if they are in `arguments`.
    """
    parser = process.Parser(prog="python -m seqmnist.main", description=__doc__)
    parser.add_argument("--version", action="version", version=seqmnist.__version__)
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run's files")
    parser.add_argument(
        "--mode",
        choices=("train", "evaluate"),
        default="train",
        help="train, or score the network in --workdir on its test set (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="with --mode=evaluate: newest, best by validation loss, or the number of a step",
    )
    switch = {"nargs": "?", "const": True, "default": False, "type": _boolean, "metavar": "BOOL"}
    parser.add_argument("--overwrite", **switch, help="replace the run in --workdir with a new one")
    parser.add_argument(
        "--debug_nans",
        **switch,
        help="name the operation that gives the first NaN; not with members",
    )
    several = parser.add_argument_group("several processes running one job")
    several.add_argument(
        "--distributed",
        **switch,
        help="ask SLURM, Open MPI, Kubernetes or the TPU pod which process this is",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument(
        "--num_processes", type=int, metavar="N", help="of the job; with --coordinator"
    )
    several.add_argument("--process_id", type=int, metavar="I", help="from 0; with --coordinator")
    add_config_arguments(parser, arguments)
    return parser


def add_config_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Adds --config and a flag for each field of `Config`; see `make_parser`."""
    parser.add_argument("--config", metavar="FILE", help="Python file with get_config()")
    group = functools.cache(parser.add_argument_group)
    for field in config_lib.fields().values():
        _add_field(group(f"config.{field.name}".rpartition(".")[0]), field)
    for name in {argument.partition("=")[0].removeprefix("--config.") for argument in arguments}:
        if config_lib.option_group(name):
            parser.add_argument(f"--config.{name}", type=_scalar, default=argparse.SUPPRESS)


def _add_field(group, field):
    within, choices = field.metadata["within"], field.metadata["choices"]
    values = within or ", ".join(choices) or field.metadata["form"]
    default = "none" if field.default is None else field.default
    facts = f"{values}; default: {default}" if values else f"default: {default}"
    kind = {bool: _boolean, dict: _json}.get(field.kind, field.kind)
    group.add_argument(
        f"--config.{field.name}",
        type=_or_none(kind) if field.is_optional else kind,
        metavar="JSON" if field.kind is dict else field.kind.__name__.upper(),
        default=argparse.SUPPRESS,
        help=f"{field.metadata['meaning']} ({facts})".replace("%", "%%"),
        **({"nargs": "?", "const": True} if field.kind is bool else {}),
    )


def _boolean(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


def _json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not JSON ({error})") from None


def _scalar(text):
    """Returns a number, a boolean or a text."""
    try:
        value = json.loads(text.lower())
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float) else text


def _or_none(kind):
    def parse(text):
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # argparse shows it
    return parse


def _parse(arguments):
    parser = make_parser(arguments)
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(unknown[0], [*vars(flags), *(f"config.{name}" for name in config_lib.fields())])
    if not flags.workdir:
        raise UserError("--workdir is missing; name a folder for the run's files, --workdir=DIR")
    if flags.checkpoint and flags.mode == "train":
        raise UserError("--checkpoint needs --mode=evaluate; training resumes from the newest")
    for name in ("config", "overwrite", "debug_nans"):
        if flags.mode == "evaluate" and getattr(flags, name):
            raise UserError(f"--{name} is for training; leave it out with --mode=evaluate")
    _check_distributed(flags)
    return flags


def _refuse(argument, known):
    name = argument.partition("=")[0]
    if field := re.match(r"--?(?:no)?config\.(.*)", name):
        config_lib.check_field_name(field[1])
        raise UserError(f"{name} is a group of fields; set one of them, see --help")
    if not name.startswith("-"):
        raise UserError(f"{argument!r} is not a flag; see --help")
    by_last_part = {flag.rpartition(".")[2]: flag for flag in reversed(known)}
    similar = difflib.get_close_matches(name.lstrip("-").rpartition(".")[2], by_last_part, n=1)
    hint = f"did you mean --{by_last_part[similar[0]]}?" if similar else "see --help"
    raise UserError(f"{name} is not a flag; {hint}")


def _check_distributed(flags):
    given = [flags.coordinator, flags.num_processes, flags.process_id]
    if any(value is not None for value in given):
        if None in given:
            raise UserError(
                "--coordinator, --num_processes and --process_id go together; give all three"
            )
        port = re.fullmatch(r".+:(\d{1,5})", flags.coordinator)
        if not port or not 1 <= int(port[1]) <= 65535:
            raise UserError(
                f"--coordinator={flags.coordinator} must be HOST:PORT, with a port from 1 to "
                "65535, e.g. 127.0.0.1:8476"
            )
        if not 0 <= flags.process_id < flags.num_processes:
            raise UserError(
                f"--process_id={flags.process_id} must be at least 0 and below "
                f"--num_processes={flags.num_processes}"
            )


def _resolve_config(flags, workdir) -> config_lib.Config:
    """Returns the configuration of --config or of the workdir, with the given fields overridden."""
    resumes = flags.config is None and not flags.overwrite and workdir.has_config()
    if flags.mode == "evaluate" or resumes:
        return _override(workdir.read_config(), flags)
    return new_config(flags)


def new_config(flags: argparse.Namespace) -> config_lib.Config:
    """Returns the experiment of --config, or the defaults, with single fields overridden."""
    load = config_lib.load_experiment
    config = load(flags.config) if flags.config is not None else config_lib.get_config()
    return _override(config, flags)


def _with_experiment(config, flags, workdir):
    """Adds the experiment, which itself adds what it names, to the plugins, so that it is kept.

    A run that is resumed keeps to its own copy.
    """
    own, names = str(paths.resolve(flags.config, "--config")), config_lib.plugin_names(config)
    if workdir.has_config() and not flags.overwrite:
        names = config_lib.plugin_names(workdir.read_config())
    elif own not in names and "," not in own:  # which separates plugins
        names.append(own)
    return config_lib.override(config, {"plugins": ",".join(names)})


def _override(config, flags):
    prefix = "config."
    values = {k[len(prefix) :]: v for k, v in vars(flags).items() if k.startswith(prefix)}
    return config_lib.override(config, values)


def _facts(flags, config):
    """Returns what must be the same in all processes of a job; folders of data may differ."""
    import jax

    facts = {"the version of seqmnist": seqmnist.__version__, "that of JAX": jax.__version__}
    shared = ("mode", "workdir", "checkpoint", "overwrite", "debug_nans")
    facts |= {f"--{name}": getattr(flags, name) for name in shared}
    fields = config_lib.fields().keys() - {f"data.{name}" for name in config_lib.PLACES}
    return facts | {f"config.{name}": config_lib.get(config, name) for name in sorted(fields)}


def _run(arguments, stop):
    flags = _parse(arguments)
    from seqmnist.workdir import Workdir

    workdir = Workdir(flags.workdir)
    if flags.mode == "train":
        workdir.recover()
    config = config_lib.validated(_resolve_config(flags, workdir))
    from seqmnist import run  # imported here: --help and mistakes need no JAX
    from seqmnist.training import distributed, steps

    with distributed.joined(
        flags.distributed, flags.coordinator, flags.num_processes, flags.process_id
    ):
        process.listen(stop)  # again: distributed JAX replaces the handler of SIGTERM
        process.set_up_jax(config)
        if flags.config and steps.own_choices(config):
            config = _with_experiment(config, flags, workdir)
        distributed.check_same(_facts(flags, config))
        if flags.mode == "train":
            run.train(
                config, workdir, overwrite=flags.overwrite, debug_nans=flags.debug_nans, stop=stop
            )
        else:
            run.evaluate(config, workdir, flags.checkpoint or "newest")
    return 128 + stop.number if stop.number else 0


def main() -> None:
    """Runs the command line and ends the process; after signal N, the exit code is 128 + N."""
    stop = StopRequest()
    process.listen(stop)
    process.leave(process.exit_code(lambda: _run(sys.argv[1:], stop)))


if __name__ == "__main__":
    main()
