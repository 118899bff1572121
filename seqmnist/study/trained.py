"""A trained network: what a workdir holds, loaded."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from scipy import special

from seqmnist.checkpoints import Checkpoints
from seqmnist.config import PLACES, Config, override
from seqmnist.datasets import sources
from seqmnist.display import describe
from seqmnist.errors import UserError
from seqmnist.networks.views import sequence_shape
from seqmnist.spec import ImageSpec
from seqmnist.study import insight
from seqmnist.study.export import Streaming
from seqmnist.training import batches, members
from seqmnist.training.steps import System, init_state, make_system
from seqmnist.training.task import as_trained
from seqmnist.workdir import Workdir

_MOST_AT_ONCE = 1 << 15  # time steps × examples, where a result is kept for each


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network of a run: its fixed half, `system`, and its parameters.

    `results` is what `results.json` holds, empty if the run has not finished; `step` is that of the
    checkpoint; `fingerprint` is that of the data it was trained on; `member` is None if the run
    trained one network.
    """

    workdir: Workdir
    config: Config
    system: System
    params: Any
    results: dict[str, Any]
    step: int
    fingerprint: str
    member: int | None = None

    def __repr__(self):
        return f"Trained({str(self.workdir)!r}: {describe(self.config.model)}, step {self.step})"

    @property
    def spec(self) -> ImageSpec:
        """Size and classes of the images that it reads."""
        return self.system.spec

    @property
    def sequence_shape(self) -> tuple[int, int]:
        """(T, F): time steps, and features per step."""
        return sequence_shape(self.config.model, self.spec)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, *spec.shape]: logits [N, C].

        Raises UserError, as the methods below do, if they are not such images.
        """
        function = functools.partial(_logits, self.system, self.params)
        return batches.in_chunks(function, self._checked(images))

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Classifies images uint8 [N, *spec.shape]: probabilities [N, C]."""
        return special.softmax(self.logits(images), axis=-1)

    def beliefs(self, images: np.ndarray) -> np.ndarray:
        """Returns the probabilities after each time step, [T, N, C]; see `insight.beliefs`."""
        return self._by_step(_beliefs, images)

    def hidden_states(self, images: np.ndarray) -> np.ndarray:
        """Returns the outputs of the top layer, [T, N, U]; see `insight.hidden_states`."""
        return self._by_step(_hidden_states, images)

    def gradient_norms(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns ‖∂loss/∂h_t‖, [D, T, N]; see `insight.gradient_norms`.

        Takes images uint8 [N, *spec.shape] and labels int [N]. Raises UserError if these are not
        one class for each image.
        """
        labels, shape = np.asarray(labels), np.shape(images)[:1]
        is_class = np.isin(labels, range(self.spec.num_classes)).all()
        if labels.dtype.kind not in "iu" or labels.shape != shape or not is_class:
            raise UserError(
                "labels are not a class for each image; give as many whole numbers from 0 to "
                f"{self.spec.num_classes - 1}"
            )
        return self._by_step(_gradient_norms, images, labels, axis=2)

    def streaming(self) -> Streaming:
        """Returns the network as one that reads step by step.

        Raises UserError if it is bidirectional: it then reads whole sequences only.
        """
        network = nnx.merge(self.system.graphdef, self.params)
        initial, structure = jax.tree.flatten(network.initial_state(1))

        def step(state, x):
            after = network.read(jax.tree.unflatten(structure, state), x[None])
            return jax.tree.leaves(after), network.answer(after)

        return Streaming(list(map(np.asarray, initial)), step, self.sequence_shape[1])

    def test_set(self, say=print) -> tuple[np.ndarray, np.ndarray]:
        """Returns the images uint8 [N, …] and labels int32 [N] that the run was tested on.

        Raises UserError if they are not available, or differ from those of the run.
        """
        config = as_trained(self.config, self.results).data
        try:
            dataset = sources.prepare(config, say)
        except UserError as error:
            folders = {name: getattr(config, name) for name in PLACES}
            gone = [name for name, path in folders.items() if path and not os.path.exists(path)]
            if not gone:
                raise
            flags = " and ".join(f"--{name}" for name in gone)
            remedy = f"name the run's folders on this machine, or none, with {flags}"
            raise UserError(f"{error}; {remedy}") from error
        if self.fingerprint != dataset.fingerprint:
            raise UserError(
                f"{dataset.directory} holds other images than those that {self.workdir} was "
                "trained on; name those, by manual_dir, or by a data_dir in which they are prepared"
            )
        return dataset.arrays("test")

    def _checked(self, images):
        """Raises UserError unless these are images as the network reads them, at least one."""
        images, shape = np.asarray(images), self.spec.shape
        if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
            raise UserError(
                f"the network reads images uint8 [N, {', '.join(map(str, shape))}], 0 to 255; got "
                f"{images.dtype} {list(images.shape)}"
            )
        return images

    def _by_step(self, function, images, *arrays, axis=1):
        at_once = min(batches.CHUNK, max(1, _MOST_AT_ONCE // self.sequence_shape[0]))
        function = functools.partial(function, self.system, self.params)
        images = self._checked(images)
        return batches.in_chunks(function, images, *arrays, most=at_once, axis=axis)


def load(
    workdir: str | os.PathLike,
    member: int | None = None,
    say=print,
    checkpoint: str = "newest",
    places: Mapping[str, str | None] | None = None,
) -> Trained:
    """Loads the network in a workdir, or one of its members.

    Without `member`, it is the one with the lowest validation loss, in a sweep among those of the
    chosen setting; or the first if the run has not finished.
    `checkpoint` is "newest", "best" by validation loss, or the number of a step. `say` is called
    with one line if another checkpoint is used, or if it is not the end of the run. `places` are
    folders of data, "data_dir" and "manual_dir", that replace those of the configuration. Raises
    UserError if there is no configuration, no usable checkpoint or no such member.
    """
    workdir = Workdir(workdir)
    config, results = workdir.read_config(), workdir.read_results()
    config = override(config, {f"data.{name}": folder for name, folder in (places or {}).items()})
    count = len(members.list_members(config))
    if count == 1 and member is not None:
        raise UserError(f"{workdir} holds one network; omit --member")
    if count > 1 and member is None:
        losses = results.get("validation", {}).get("loss")
        reason = "the one with the lowest validation loss" if losses else "the first"
        first = config.members.num * (results.get("best") or 0)
        losses = np.atleast_1d(np.array(losses or 0.0, float))
        own = losses[first : first + config.members.num]
        member = first + int(np.nan_to_num(own, nan=np.inf).argmin())
        say(f"Member {member} of members 0 to {count - 1}, {reason}")
    if count > 1 and member not in range(count):
        raise UserError(f"{workdir} holds members 0 to {count - 1}, not {member}")
    system = None

    def expect(facts):
        nonlocal system
        workdir.check_settings(facts["settings"])
        system = make_system(config, spec=ImageSpec.from_dict(facts["images"]))
        lead = () if count == 1 else (count,)
        one = jax.eval_shape(lambda: init_state(config, system, 0)).params
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), one)

    params, facts = Checkpoints(workdir.path).restore_params(expect, say, checkpoint)
    if results and facts["step"] != results["steps"]:
        say(f"NOTICE: this is step {facts['step']} of {results['steps']} of the finished run")
    if member is not None:
        params = jax.tree.map(lambda leaf: leaf[member], params)
    step, fingerprint = facts["step"], facts["fingerprint"]
    return Trained(workdir, config, system, params, results, step, fingerprint, member)


_logits, _beliefs, _hidden_states, _gradient_norms = (
    jax.jit(function, static_argnums=0)
    for function in (System.apply, insight.beliefs, insight.hidden_states, insight.gradient_norms)
)
