"""Compares networks fairly: chooses settings by validation, trains again, then scores test once.

Example:
  python -m tools.study experiments/studies/cells_digits.py --workdir=runs/cells_digits

STUDY is a Python file whose `get_study()` returns a `seqmnist.study.plan.Study`. DIR gets an
ordinary workdir for each training, and study.json, study.csv, study.md, study.tex and study.html.
After a stop, by Ctrl-C or otherwise, the same command resumes the study. If it runs several times
at once, also on several hosts with a common disk, each trains entries that no other is training.
"""

import contextlib
import pathlib
import time
from typing import Any

from seqmnist.errors import InUseError, UserError, explain_storage
from tools import cli

RESULTS, _ENTRY = "study.json", "entry.json"
_REMEDY = "make room and run the same command again"
_PATIENCE = 5  # seconds after which a process looks again whether the others have finished


class _Runs:
    """The trainings of a study, with one progress display: a bar, or a line for each."""

    def __init__(self, workdir: pathlib.Path, stop: Any, total: float):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TimeRemainingColumn()
        self._bar = Progress(*columns, transient=True, speed_estimate_period=600)
        self._bar.disable = not self._bar.console.is_terminal
        self._task, self._total = self._bar.add_task("", total=total), total
        self._workdir, self._stop, self._done = workdir, stop, {}  # work, by folder
        self._pace = []  # of what this process has trained: (work, seconds)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def train(self, title, config, work, folder, **options) -> dict[str, Any]:
        """Trains what is left of a run in a folder of the study.

        Returns its results, or {} if all of its networks diverged.
        """
        from seqmnist import run
        from seqmnist.display import Quiet
        from seqmnist.training import divergence

        began, num_epochs = time.monotonic(), config.train.num_epochs

        def advance(epochs):
            self._done[folder] = work * epochs / num_epochs
            self._bar.update(self._task, completed=sum(self._done.values()))

        self._bar.update(self._task, description=title)
        display, workdir = Quiet(advance), self._workdir / folder
        try:
            results = run.train(config, workdir, stop=self._stop, display=display, **options)
        except divergence.DivergedError:
            results = {}
        self._done[folder] = work
        if display.num_epochs:
            seconds = time.monotonic() - began
            self._pace.append((work * display.num_epochs / num_epochs, seconds))
            if self._bar.disable:
                done, spent = map(sum, zip(*self._pace, strict=True))
                left = (self._total - sum(self._done.values())) * spent / done
                print(f"{title}: {seconds:.1f} s; about {left:,.0f} s left", flush=True)
        return results


def perform(study: Any, workdir: pathlib.Path, stop: Any = None) -> dict[str, Any]:
    """Trains what is left of a study and returns what `study.json` holds.

    Raises UserError if the workdir holds another study.
    """
    from seqmnist.datasets import sources
    from seqmnist.study import plan
    from seqmnist.training.steps import check_names
    from seqmnist.workdir import PLAN, Workdir, read_json, write_json

    _check(study, workdir)
    entries, jobs = {}, {}
    for name, config in study.entries.items():
        check_names(config)
        spec = sources.prepare(config.data, print).spec
        tries = plan.selection(study, name, spec) if study.select else []
        final = plan.final(study, name, {}, spec)
        for each in (final, *(each for _, each in tries)):
            check_names(each)
        jobs[name] = spec, tries, final, plan.flops_per_image(final, spec)

    with explain_storage(f"--workdir={workdir}", "choose another"), _in_turn(workdir):
        _check(study, workdir)
        write_json(workdir / PLAN, study.to_dict())

    def work(config, flops):
        return config.train.num_epochs * config.members.num * flops

    total = 0.0
    for _, tries, final, flops in jobs.values():
        total += sum(work(config, flops) for config in (final, *(config for _, config in tries)))

    def train(runs, name):
        """Returns what is known of an entry, once what is left of it has been trained.

        Raises InUseError if another process trains it.
        """
        folder = Workdir(workdir / "select" / name)
        with folder.hold(print):
            file = folder.path / _ENTRY
            if not file.exists():
                found = train_alone(runs, name)
                with explain_storage(f"--workdir={workdir}", _REMEDY):
                    write_json(file, found)
            return read_json(file)

    def train_alone(runs, name):
        spec, tries, final, flops = jobs[name]
        tried = []
        for i, (fixed, config) in enumerate(tries):
            title, folder = f"{name}: try {i + 1} of {len(tries)}", f"select/{name}/{i + 1}"
            results = runs.train(title, config, work(config, flops), folder, withhold_test=True)
            tried.append((fixed, results))
        setting = plan.choose(study, tried) if tried else {}
        config = plan.final(study, name, setting, spec)
        title = f"{name}: {len(study.seeds)} seeds"
        results = runs.train(title, config, work(final, flops), f"final/{name}")
        if not results:
            raise UserError(
                f"{name}: all networks diverged in the chosen setting; select among smaller "
                "values of optimizer.learning_rate, in another --workdir"
            )
        return plan.describe(study, setting, tried, config, results, spec)

    said = []
    with _Runs(workdir, stop, total) as runs:
        while left := [name for name in jobs if name not in entries]:
            for name in left:
                with contextlib.suppress(InUseError):
                    entries[name] = train(runs, name)
            if not any(name in entries for name in left):
                if said != left:
                    print(f"Other processes train {', '.join(left)}", flush=True)
                said = left
                time.sleep(_PATIENCE)
            if stop is not None and stop.number:
                raise SystemExit(128 + stop.number)
    return plan.summarize(study, {name: entries[name] for name in jobs})


def _check(study, workdir):
    """Raises UserError if the workdir holds another study, or a run."""
    from seqmnist.workdir import PLAN, Workdir, read_json

    plan = workdir / PLAN
    if plan.exists() and read_json(plan) != study.to_dict():
        raise UserError(f"--workdir={workdir} holds another study; choose another --workdir")
    if Workdir(workdir).has_config():
        raise UserError(f"--workdir={workdir} holds a run; choose another --workdir for the study")


@contextlib.contextmanager
def _in_turn(workdir):
    """Holds the folder of a study, into which several processes may write; waits for the others."""
    from seqmnist.workdir import Workdir

    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(Workdir(workdir).hold(print))
                break
            except InUseError:
                time.sleep(0.1)
        yield


def _main(arguments):
    from seqmnist import process
    from seqmnist.stop import StopRequest
    from seqmnist.study import plan
    from seqmnist.workdir import Workdir, write_json
    from tools import leaderboard

    study, workdir = plan.load(arguments.study), Workdir(arguments.workdir).path
    for config in study.entries.values():
        for name, folder in cli.places(arguments).items():
            setattr(config.data, name, folder)
    widest = plan.widest(study)
    process.set_up_jax(widest)
    stop = StopRequest()
    process.listen(stop)
    found = perform(study, workdir, stop)
    with explain_storage(f"--workdir={workdir}", _REMEDY), _in_turn(workdir):
        write_json(workdir / RESULTS, found)
        page = leaderboard.write(workdir, found)
    leaderboard.show(workdir, found)
    print(f"Study: {page}")
    return found


def _make_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("study", metavar="STUDY", help="Python file with get_study()")
    parser.add_argument("--workdir", metavar="DIR", required=True, help="folder of the study")
    cli.add_place_arguments(parser)
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
