"""Norms of gradients, updates and parameters, from a step to the records and TensorBoard."""

import functools
import json
import pathlib
import re
import signal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata

from seqmnist import config as config_lib
from seqmnist import run
from seqmnist.checkpoints import Checkpoints
from seqmnist.config import Config, ModelConfig, OptimizerConfig
from seqmnist.errors import UserError
from seqmnist.stop import StopRequest
from seqmnist.study import trained
from seqmnist.training import batches, devices, steps
from seqmnist.training.loop import Loop, Resident
from seqmnist.training.metrics import parameter_norm
from seqmnist.training.steps import init_state, make_system
from seqmnist.workdir import Workdir
from tools import kill_stress

RATE, CLIP = 0.1, 0.5
CONFIG = Config(
    model=ModelConfig(hidden_size=5),
    optimizer=OptimizerConfig(name="sgd", learning_rate=RATE, clip_norm=CLIP),
)
ROWS = [batches.batch_rows(np.random.default_rng(i).permutation(100), 8) for i in range(2)]


@pytest.fixture(scope="module")
def system():
    return make_system(CONFIG)


def initial(system, seed):
    state = jax.jit(functools.partial(init_state, CONFIG, system))(np.uint32(seed))
    return jax.tree.map(np.asarray, state)  # a loop donates what it is given


def expected_norms(system, state, digits, rows):
    """SGD with momentum on clipped gradients, in NumPy and float64: norms by step."""
    images, labels = (jnp.asarray(x) for x in digits)
    treedef = jax.tree.structure(state.params)

    @jax.jit
    def gradient(params, images, labels):
        def mean_loss(params):
            log_beliefs = jax.nn.log_softmax(system.apply(params, images))
            return -log_beliefs[jnp.arange(len(labels)), labels].mean()

        return jax.grad(mean_loss)(params)

    def norm(arrays):
        return np.sqrt(sum(np.sum(np.square(x)) for x in arrays))

    params = [np.float64(x) for x in jax.tree.leaves(state.params)]
    momenta, norms = [np.zeros_like(x) for x in params], []
    for row in rows:
        row = row[row >= 0]  # without padding
        grads = gradient(
            treedef.unflatten([np.float32(x) for x in params]), images[row], labels[row]
        )
        grads = [np.float64(x) for x in jax.tree.leaves(grads)]
        size = norm(grads)
        momenta = [0.9 * m + g * min(1, CLIP / size) for m, g in zip(momenta, grads, strict=True)]
        params = [x - RATE * m for x, m in zip(params, momenta, strict=True)]
        norms.append((size, RATE * norm(momenta)))
    assert (np.array(norms)[:, 0] > CLIP).any()  # or clipping would not show
    return np.array(norms), norm(params)


def test_norms_are_those_of_numpy_step_by_step(system, digits):
    state = initial(system, 0)
    norms, of_params = expected_norms(system, state, digits, ROWS[0])
    loop, rows = Loop(system, Resident(*digits)), ROWS[0]
    for progress in loop.train(loop.start(state), rows, breaks=range(len(rows))):
        last = [*progress.last.norms().values()]
        np.testing.assert_allclose(last, norms[progress.step - 1], rtol=1e-4)
    means = progress.sums.norms(len(rows))
    np.testing.assert_allclose([*means.values()], norms.mean(0), rtol=1e-4)
    np.testing.assert_allclose(parameter_norm(progress.state.params), of_params, rtol=1e-5)


def test_the_mean_loss_of_a_step_is_that_of_its_batch(system, digits):
    loop, rows = Loop(system, Resident(*digits)), ROWS[0]
    before = 0.0
    for progress in loop.train(loop.start(initial(system, 0)), rows, breaks=range(len(rows))):
        size = (rows[progress.step - 1] >= 0).sum()
        loss = (float(progress.sums.loss) - before) / size
        assert progress.last.means()["loss"] == pytest.approx(loss, rel=1e-4)
        before = float(progress.sums.loss)


def test_members_have_the_norms_of_lone_runs(system, digits):
    states = [initial(system, seed) for seed in (0, 1)]
    loop = Loop(system, Resident(*digits), has_members=True)
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    *_, progress = loop.train(loop.start(together), np.stack(ROWS))
    found = [progress.sums.norms(13), progress.last.norms()]
    size = parameter_norm(progress.state.params, (2,))
    for member in (0, 1):
        lone = Loop(system, Resident(*digits))
        *_, alone = lone.train(lone.start(states[member]), ROWS[member])
        for norms, expected in zip(found, (alone.sums.norms(13), alone.last.norms()), strict=True):
            of_member = {name: values[member] for name, values in norms.items()}
            assert of_member == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(size[member], parameter_norm(alone.state.params), rtol=1e-6)


def test_a_batch_that_is_split_has_the_norms_of_the_whole(system, digits):
    ends = []
    for num_data in (1, 4):
        loop = Loop(system, Resident(*digits), devices.make_mesh(1, num_data))
        *_, end = loop.train(loop.start(initial(system, 0)), ROWS[0])
        ends.append((end.sums.norms(13), end.last.norms()))
    for one, split in zip(*ends, strict=True):
        assert split == pytest.approx(one, rel=1e-4)


def test_what_has_diverged_or_stopped_has_no_norms(system, digits):
    loop = Loop(system, Resident(*digits), has_members=True)
    states = jax.tree.map(lambda x: np.stack([x] * 3), initial(system, 0))
    begin = loop.start(states)
    marked = begin.sums._replace(loss=np.array([0, np.nan, np.inf], np.float32))
    begin = loop.start(states, marked)
    *_, end = loop.train(begin, np.stack([ROWS[0]] * 3))
    for norms in (end.sums.norms(13), end.last.norms()):
        assert all(np.isfinite(x).tolist() == [True, False, False] for x in norms.values())
    assert np.isfinite(end.last.loss).tolist() == [True, False, False]


def test_an_evaluation_computes_no_norms(system, digits, monkeypatch):
    def forbidden(tree):
        raise AssertionError

    monkeypatch.setattr(steps, "_norm", forbidden)
    loop = Loop(system, Resident(*digits))
    sums = loop.evaluate(initial(system, 0).params, ROWS[0])
    assert (float(sums.gradient_norm), float(sums.update_norm)) == (0, 0)


# ---- whole runs


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_config(data_dir):
    def make(num_epochs=2, **groups):
        groups = {"model": {"hidden_size": 8}, **groups}
        groups["data"] = {"name": "mnist_5k", "data_dir": str(data_dir)}
        train = {"num_epochs": num_epochs, **groups.pop("train", {})}
        return config_lib.from_dict({**groups, "train": train})

    return make


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def without(records, *names):
    return [{k: v for k, v in record.items() if k not in names} for record in records]


def stop_after(monkeypatch, config, workdir, number):
    """Trains until an event of that number, as if a signal had come then."""
    stop, advance, seen = StopRequest(), run.Session.advance, []
    stop.defer()

    def interrupted(session, progress, debug_nans):
        seen.append(progress.step)
        if len(seen) == number:
            stop.receive(signal.SIGTERM)
        advance(session, progress, debug_nans)

    with monkeypatch.context() as patch:
        patch.setattr(run.Session, "advance", interrupted)
        with pytest.raises(SystemExit):
            run.train(config, workdir, stop=stop)


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 2])
def test_records_hold_norms(members, make_config):
    run.train(make_config(members={"num": members}), "a")
    for record in Workdir("a").read_metrics():
        last = [
            parameter_norm(trained.load("a", member, checkpoint=str(record["step"])).params)
            for member in ((None,) if members == 1 else range(members))
        ]
        np.testing.assert_allclose(np.ravel(record["parameter_norm"]), last, rtol=1e-6)
        for name in ("train/gradient_norm", "train/update_norm"):
            assert np.shape(record[name]) == np.shape(record["train/loss"])
            assert (np.ravel(record[name]) > 0).all()
    assert not pathlib.Path("a/steps.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("members", [1, 2])
def test_a_resumed_run_logs_as_one_that_was_not_interrupted(members, make_config, monkeypatch):
    groups = {"members": {"num": members}, "train": {"log_every_steps": 4}}
    config = make_config(3, **groups)
    run.train(config, "whole")
    stop_after(monkeypatch, config, "parts", 3)
    logged = lines("parts/steps.jsonl")
    assert 0 < len(logged) < len(lines("whole/steps.jsonl"))
    # As after a kill: lines beyond the checkpoint, and one that is torn.
    with pathlib.Path("parts/steps.jsonl").open("a") as file:
        file.write(json.dumps({**logged[-1], "step": 60}) + '\n{"step": 6')
    run.train(config, "parts")
    assert kill_stress.outcome(pathlib.Path("parts")) == kill_stress.outcome(pathlib.Path("whole"))
    logged = [without(lines(f"{name}/steps.jsonl"), "train_seconds") for name in ("parts", "whole")]
    assert logged[0] == logged[1]
    assert [line["step"] for line in logged[0]] == [*range(4, 76, 4)]
    seconds = [line["train_seconds"] for line in lines("parts/steps.jsonl")]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_logging_of_steps_changes_no_result_and_goes_with_the_run(make_config):
    run.train(make_config(), "a")
    before = kill_stress.outcome(pathlib.Path("a"))
    run.train(make_config(train={"log_every_steps": 1}), "a", overwrite=True)
    assert kill_stress.outcome(pathlib.Path("a")) == before
    records, steps = Workdir("a").read_metrics(), lines("a/steps.jsonl")
    assert [line["step"] for line in steps] == [*range(1, 51)]
    for record in records:
        epoch = steps[record["step"] - 25 : record["step"]]
        for name in ("gradient_norm", "update_norm"):
            mean = np.mean([line[name] for line in epoch])
            assert record[f"train/{name}"] == pytest.approx(mean, rel=1e-5)
        loss = np.mean([line["loss"] for line in epoch])  # batches are of one size
        assert record["train/loss"] == pytest.approx(loss, rel=1e-5)
    run.train(make_config(), "a", overwrite=True)
    assert not pathlib.Path("a/steps.jsonl").exists()


@pytest.mark.slow
def test_steps_that_no_run_has_written_are_refused(make_config):
    run.train(make_config(1), "a")
    pathlib.Path("a/steps.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"steps\.jsonl is not JSON"):
        run.train(make_config(2), "a")
    run.train(make_config(1), "a", overwrite=True)
    assert not pathlib.Path("a/steps.jsonl").exists()


class SumsBefore(NamedTuple):
    """The sums of versions that had no norms."""

    loss: Any
    correct: Any
    count: Any


@pytest.mark.slow
@pytest.mark.parametrize("within_epoch", [False, True])
def test_checkpoints_of_earlier_versions_resume(within_epoch, make_config, monkeypatch):
    config = make_config(3)
    run.train(config, "whole")
    save = Checkpoints.save

    def save_before(checkpoints, saved):
        save(checkpoints, saved._replace(sums=SumsBefore(*saved.sums[:3])))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_before)
        if within_epoch:
            stop_after(patch, config, "a", 1)
        else:
            run.train(make_config(1), "a")
    run.train(config, "a")
    whole, found = (kill_stress.outcome(pathlib.Path(name)) for name in ("whole", "a"))
    if within_epoch:
        for name in ("train/gradient_norm", "train/update_norm"):
            assert found["metrics"][0][name] is None
            found["metrics"][0][name] = whole["metrics"][0][name]
    assert found == whole


def scalars(accumulator, tag):
    """Step, value and wall time of each point of a curve."""
    return [
        (event.step, float(np.frombuffer(event.tensor_proto.tensor_content, np.float32)[0])
         if event.tensor_proto.tensor_content else event.tensor_proto.float_val[0],
         event.wall_time)
        for event in accumulator.Tensors(tag)
    ]  # fmt: skip


@pytest.mark.slow
def test_tensorboard_shows_a_resumed_run_without_a_hole(make_config, monkeypatch):
    config = make_config(3, train={"log_every_steps": 5}, optimizer={"clip_norm": 1.0})
    stop_after(monkeypatch, config, "a", 12)
    now = run.time.time
    monkeypatch.setattr("seqmnist.events.time.time", lambda: now() + 1e6)  # it resumes much later
    run.train(config, "a")
    (file,) = pathlib.Path("a").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"tensors": 0}).Reload()
    records, steps = Workdir("a").read_metrics(), lines("a/steps.jsonl")
    ends = np.cumsum([record["seconds"] for record in records])
    assert len(records) == 3
    assert len(steps) == 15
    for tag in ("train/loss", "validation/loss", "train/gradient_norm", "parameter_norm"):
        at, values, times = zip(*scalars(events, tag), strict=True)
        assert at == (25, 50, 75)
        np.testing.assert_allclose(values, [record[tag] for record in records], rtol=1e-6)
        np.testing.assert_allclose(np.diff(times), np.diff(ends), atol=1e-3)
    begin = times[0] - ends[0]
    for name in ("loss", "gradient_norm", "update_norm"):
        at, values, times = zip(*scalars(events, f"step/{name}"), strict=True)
        assert list(at) == [line["step"] for line in steps]
        np.testing.assert_allclose(values, [line[name] for line in steps], rtol=1e-6)
        expected = [line["train_seconds"] for line in steps]
        np.testing.assert_allclose(np.array(times) - begin, expected, atol=1e-3)
    # What shares a chart exists.
    (layout,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag[0] for chart in layout.category[0].chart}
    curves = {
        title: {tag for tag in events.Tags()["tensors"] if re.match(chart, tag)}
        for title, chart in charts.items()
    }
    assert curves["loss"] == {"train/loss", "validation/loss"}
    assert curves["accuracy"] == {"train/accuracy", "validation/accuracy"}
    # Hyper-parameters have their types.
    (content,) = (events.summary_metadata["_hparams_/session_start_info"].plugin_data.content,)
    session = hparams_metadata.parse_session_start_info_plugin_data(content)
    assert session.hparams["optimizer.learning_rate"].number_value == pytest.approx(1e-3)
    assert session.hparams["optimizer.clip_norm"].number_value == 1
    assert session.hparams["model.cell"].string_value == "simple_rnn"
    assert session.hparams["model.reverse"].bool_value is False
    assert "checkpoint.keep" not in session.hparams
