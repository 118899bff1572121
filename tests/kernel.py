"""Runs a notebook in a kernel, as Jupyter does."""

import os
import tempfile

import nbclient
import nbformat
from conftest import QUICK, REPOSITORY
from traitlets.config import Config


class Kernel(nbclient.NotebookClient):
    """Keeps the outputs of cells; counts how often an output was replaced."""

    num_updates = 0

    def process_message(self, msg, *arguments):
        self.num_updates += msg["msg_type"] == "update_display_data"
        return super().process_message(msg, *arguments)


def execute(
    notebook: nbformat.NotebookNode, folder: os.PathLike, environment: dict, **options
) -> Kernel:
    """Runs the cells of a notebook in a folder; they keep their outputs."""
    options |= {"timeout": 120, "coalesce_streams": True}
    options["resources"] = {"metadata": {"path": str(folder)}}
    with tempfile.TemporaryDirectory() as channels:
        # By files: a port, chosen before it is used, may be taken by another test meanwhile.
        manager = {"transport": "ipc", "ip": f"{channels}/channel"}
        kernel = Kernel(notebook, config=Config(KernelManager=manager), **options)
        kernel.execute(env=environment)
    return kernel


def environment(data_dir: os.PathLike, path: os.PathLike = REPOSITORY) -> dict[str, str]:
    """Returns the environment of a user's program, with mnist_5k prepared and the packages in path.

    It compiles as quickly as the tests do.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUMPY")}
    return kept | {"XLA_FLAGS": QUICK, "TFDS_DATA_DIR": str(data_dir), "PYTHONPATH": str(path)}
