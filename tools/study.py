"""Compares networks fairly: chooses settings by validation, trains again, then scores test once.

Example:
  python -m tools.study experiments/studies/cells_digits.py --workdir=runs/cells_digits

STUDY is a Python file whose `get_study()` returns a `seqmnist.study.plan.Study`. DIR gets an
ordinary workdir for each training, and study.json, study.csv, study.md, study.tex and study.html.
After a stop, by Ctrl-C or otherwise, the same command resumes the study. If it runs several times
at once, also on several hosts with a common disk, each trains entries that no other is training.
"""

import contextlib
import copy
import hashlib
import pathlib
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from seqmnist import process
from seqmnist.errors import InUseError, UserError, explain_storage
from seqmnist.stop import StopRequest
from seqmnist.workdir import PLAN, Workdir, fits, read_json, write_json
from tools import cli

RESULTS, _ENTRY = "study.json", "entry.json"
_REMEDY = "make room and run the same command again"
_PATIENCE = 5  # seconds after which a process looks again whether the others have finished


class _Job(NamedTuple):
    """What an entry of a study needs."""

    name: str
    data: Any  # its `sources.Prepared`
    tries: list[tuple[dict[str, Any], Any]]  # of `plan.selection`
    final: Any  # its configuration, with the settings that its file gives
    flops: int  # per image

    def work(self, config: Any) -> float:
        """Returns how long a training takes in proportion to others."""
        from seqmnist.training import members

        return config.train.num_epochs * len(members.list_members(config)) * self.flops


class _Runs:
    """The trainings of a study, with one progress display: a bar, or a line for each."""

    def __init__(self, study: Any, workdir: pathlib.Path, stop: Any, jobs: Iterable[_Job]):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        configs = [(job, config) for job in jobs for _, config in (*job.tries, ({}, job.final))]
        self._total = sum(job.work(config) for job, config in configs)
        columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TimeRemainingColumn()
        self._bar = Progress(*columns, transient=True, speed_estimate_period=600)
        self._bar.disable = not self._bar.console.is_terminal
        self._task = self._bar.add_task("", total=self._total)
        self._study, self._workdir, self._stop = study, workdir, stop
        self._done = {}  # work, by folder
        self._trained, self._seconds = 0.0, 0.0  # work of this process, and how long it took

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def entry(self, job: _Job) -> dict[str, Any]:
        """Trains what is left of an entry, and returns what `study.json` holds about it.

        Raises InUseError if another process trains it.
        """
        from seqmnist.study import plan

        folder = Workdir(self._workdir / "select" / job.name)
        with folder.hold(print):
            file = folder.path / _ENTRY
            if not file.exists():
                found = self._select_and_train(job)
                with explain_storage(f"--workdir={self._workdir}", _REMEDY):
                    write_json(file, found)
            found = read_json(file)
        if not fits(found, plan.ENTRY_KINDS):
            raise UserError(
                f"{file} is not what a study writes; remove it and run the same command again"
            )
        return found

    def _select_and_train(self, job):
        from seqmnist.study import plan

        study, name, tried = self._study, job.name, []
        for i, (fixed, config) in enumerate(job.tries, 1):
            title, folder = f"{name}: try {i} of {len(job.tries)}", f"select/{name}/{i}"
            results = self._train(title, config, job, folder, withhold_test=True)
            tried.append((fixed, results))
        setting = plan.choose(study, name, tried) if tried else {}
        config = plan.final(study, name, setting, job.data.spec)
        results = self._train(f"{name}: {len(study.seeds)} seeds", config, job, f"final/{name}")
        if not results:
            raise UserError(
                f"{name}: all networks diverged in the chosen setting; select among smaller "
                "values of optimizer.learning_rate, in another --workdir"
            )
        return plan.describe(study, setting, tried, config, results, job.data.spec)

    def _train(self, title, config, job, folder, **options):
        """Trains what is left of a run in a folder of the study.

        Returns its results, or {} if all of its networks diverged.
        """
        from seqmnist import run
        from seqmnist.display import Quiet
        from seqmnist.training import divergence

        began, num_epochs, work = time.monotonic(), config.train.num_epochs, job.work(config)

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
            self._trained += work * display.num_epochs / num_epochs
            self._seconds += seconds
            if self._bar.disable:
                pace = self._seconds / self._trained
                left = (self._total - sum(self._done.values())) * pace
                print(f"{title}: {seconds:.1f} s; about {left:,.0f} s left", flush=True)
        return results


def perform(study: Any, workdir: pathlib.Path, stop: Any = None) -> dict[str, Any]:
    """Trains what is left of a study and returns what `study.json` holds.

    Raises UserError if the workdir holds another study.
    """
    from seqmnist.config import read_plugins
    from seqmnist.study import plan

    planned = study.to_dict()
    planned["plugins"] = {
        name: [hashlib.sha256(content).hexdigest() for content in read_plugins(config)]
        for name, config in study.entries.items()
    }
    _check(planned, workdir)
    jobs = _jobs(study, workdir)
    planned["fingerprints"] = {job.name: job.data.fingerprint for job in jobs}
    folder = Workdir(workdir)
    with explain_storage(f"--workdir={workdir}", "choose another"), folder.hold(print, wait=True):
        _check(planned, workdir)
        write_json(workdir / PLAN, planned)
    entries, said = {}, ""
    with _Runs(study, workdir, stop, jobs) as runs:
        while left := [job for job in jobs if job.name not in entries]:
            for job in left:
                with contextlib.suppress(InUseError):
                    entries[job.name] = runs.entry(job)
            if not any(job.name in entries for job in left):
                names = ", ".join(job.name for job in left)
                if said != names:
                    print(f"Other processes train {names}", flush=True)
                said = names
                time.sleep(_PATIENCE)
            if stop is not None and stop.number:
                raise SystemExit(128 + stop.number)
    return plan.summarize(study, {job.name: entries[job.name] for job in jobs})


def _jobs(study, workdir):
    """Returns a `_Job` for each entry; raises UserError if one of its trainings cannot run."""
    import numpy as np

    from seqmnist.datasets import sources
    from seqmnist.study import plan
    from seqmnist.training.steps import check_names

    jobs, notices = [], set()
    for name, config in study.entries.items():
        Workdir(workdir / "select" / name)  # refuses a name that no folder can have
        check_names(config)
        data = sources.prepare(config.data, print)
        spec = data.spec
        for split in ("train", "test"):  # images may differ in size and color
            first = jobs[0].data if jobs else data
            if not np.array_equal(data.mapped(split)[1], first.mapped(split)[1]):
                raise UserError(
                    f"{jobs[0].name} is of {first.name} and {name} of {data.name}, which are "
                    "other examples; compare networks on the same data"
                )
        if data.notice and data.notice not in notices:
            print(f"NOTICE: {data.notice}")
        notices.add(data.notice)
        tries = plan.selection(study, name, spec) if study.select else []
        final = plan.final(study, name, {}, spec)
        for each in (final, *(each for _, each in tries)):
            check_names(each)
        jobs.append(_Job(name, data, tries, final, plan.flops_per_image(final, spec)))
    return jobs


def _check(planned, workdir):
    """Raises UserError if the workdir holds another study, or a run."""
    plan = workdir / PLAN
    if plan.exists():
        there, planned = _without_places(read_json(plan)), _without_places(planned)
        known = {key: planned.get(key) for key in ("fingerprints", "plugins")}
        there = known | there  # earlier versions had none
        if any(there.get(key) != value for key, value in planned.items()):
            raise UserError(
                f"--workdir={workdir} holds another study, or one of other data or plugins; choose "
                "another --workdir"
            )
    if Workdir(workdir).has_config():
        raise UserError(f"--workdir={workdir} holds a run; choose another --workdir for the study")


def _without_places(planned):
    """Returns a plan without the folders and files of this machine, which may have moved."""
    planned = copy.deepcopy(planned)
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # it is no plan
        for config in planned["entries"].values():
            config["plugins"] = config["data"]["data_dir"] = config["data"]["manual_dir"] = None
    return planned if isinstance(planned, dict) else {}


def _main(arguments):
    from seqmnist.study import plan
    from tools import leaderboard

    study, folder = plan.load(arguments.study), Workdir(arguments.workdir)
    workdir = folder.path
    for config in study.entries.values():
        for name, place in cli.places(arguments).items():
            setattr(config.data, name, place)
    process.set_up_jax(plan.widest(study))
    stop = StopRequest()
    process.listen(stop)
    found = perform(study, workdir, stop)
    with explain_storage(f"--workdir={workdir}", _REMEDY), folder.hold(print, wait=True):
        write_json(workdir / RESULTS, found)
        page, rows = leaderboard.write(workdir, found)
    leaderboard.show(found, rows)
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
