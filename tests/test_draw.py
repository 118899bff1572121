"""The drawing page: what it asks by the library's test client, and the page in a real browser."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
import urllib.request

import numpy as np
import pytest
from conftest import REPOSITORY
from test_predict import call

from seqmnist.config import ModelConfig
from seqmnist.networks import views
from seqmnist.spec import MNIST, ImageSpec
from seqmnist.study import images, trained
from tools import draw

testclient = pytest.importorskip("starlette.testclient")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def network(finished_run):
    return trained.load(finished_run)


@pytest.fixture(scope="module")
def client(network):
    return testclient.TestClient(draw.make_app(network), base_url="http://127.0.0.1")


@pytest.mark.slow
def test_the_page_and_what_it_is_told(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "pointerdown" in page.text
    assert not re.search(r"(src|href)=\"(?!data:)", page.text)  # nothing from elsewhere
    about = client.get("/about").json()
    assert about["time_steps"] == 28
    assert about["read_at"] == [i // 28 for i in range(784)]
    assert "simple_rnn(8)" in about["network"]
    assert about["is_of_digits"]
    assert about["class_names"] == list("0123456789")


@pytest.mark.slow
def test_a_drawing_is_answered_as_its_prepared_image(client, network):
    drawing = np.full((300, 200), 255, np.uint8)
    drawing[40:260, 90:115] = 0
    answer = client.post("/beliefs?width=200&height=300", content=drawing.tobytes()).json()
    image = images.prepare(drawing, "drawing", MNIST)
    np.testing.assert_array_equal(np.reshape(answer["image"], (28, 28)), image)
    beliefs = network.beliefs(image[None])[:, 0]
    np.testing.assert_allclose(answer["beliefs"], beliefs, atol=1e-4)
    assert answer["class"] == beliefs[-1].argmax()


class Pretended:
    """A network that reads rows, and believes in the class whose number is the last byte."""

    def __init__(self, spec):
        self.spec = spec
        self.sequence_shape = (spec.height, spec.width * spec.channels)
        self.config = types.SimpleNamespace(model=ModelConfig())

    def beliefs(self, images):
        assert (images.shape[1:], images.dtype) == (self.spec.shape, np.uint8)
        labels = images.reshape(len(images), -1)[:, -1]
        sure = np.eye(self.spec.num_classes)[labels % self.spec.num_classes]
        return np.linspace(0, 1, self.spec.height).reshape(-1, 1, 1) * sure


SPECS = [
    ImageSpec(8, 8, 1, tuple("0123456789")),
    ImageSpec(32, 24, 3, ("cat", "dog", "fish")),
    ImageSpec(28, 28, 1, tuple(f"kind {i}" for i in range(47))),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.shape}")
def test_a_network_of_any_images_sees_light_strokes_on_a_dark_page(spec, monkeypatch):
    monkeypatch.setattr(views, "read_at", lambda model, spec: np.zeros((spec.height, spec.width)))
    app = draw.make_app(Pretended(spec))
    client = testclient.TestClient(app, base_url="http://127.0.0.1")
    about = client.get("/about").json()
    assert not about["is_of_digits"]
    assert ImageSpec.from_dict({name: about[name] for name in spec.to_dict()}) == spec
    assert len(about["read_at"]) == spec.height * spec.width
    drawing = np.full((10 * spec.height, 10 * spec.width), 255, np.uint8)
    drawing[:20], drawing[-20:] = 0, 253
    query = f"width={10 * spec.width}&height={10 * spec.height}"
    answer = client.post(f"/beliefs?{query}", content=drawing.tobytes()).json()
    image = np.reshape(answer["image"], spec.shape)
    assert (image[0] == 255).all()
    assert (image[4:-4] == 0).all()
    assert (image[-1] == 2).all()
    assert answer["class"] == 2
    assert np.shape(answer["beliefs"]) == (spec.height, spec.num_classes)


@pytest.mark.parametrize(
    ("query", "content", "status", "word"),
    [
        ("width=28&height=28", bytes(784), 422, "shows nothing"),
        ("width=28&height=27", bytes(784), 400, "height × width"),
        ("width=-1&height=28", bytes(784), 400, "height × width"),
        ("width=a&height=28", bytes(784), 400, "height × width"),
        ("width=28", bytes(784), 400, "height × width"),
        ("width=0&height=0", b"", 400, "height × width"),
        ("width=2000&height=2000", bytes(4_000_000), 400, "height × width"),
    ],
)
def test_what_is_no_drawing_is_refused(client, query, content, status, word):
    response = client.post(f"/beliefs?{query}", content=content)
    assert response.status_code == status
    assert word in response.json()["error"]


def test_other_hosts_are_refused(client):
    assert client.get("/about", headers={"host": "elsewhere.example"}).status_code == 400


@pytest.mark.parametrize("port", ["70000", "-1", "a", "9" * 5000])
def test_what_is_no_port_is_refused(port, monkeypatch, capsys):
    assert call(monkeypatch, draw, "--workdir=x", f"--port={port}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--port" in line


def test_a_port_in_use_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    with socket.create_server((draw.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        assert call(monkeypatch, draw, "--workdir=x", f"--port={port}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--port={port} cannot be used (Address already in use" in line


@contextlib.contextmanager
def served(workdir):
    """Runs the tool on any port; yields its process and the address that it prints."""
    command = [sys.executable, "-m", "tools.draw", f"--workdir={workdir.name}", "--port=0"]
    process = subprocess.Popen(
        command,
        cwd=workdir.parent,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        yield process, re.search(r"http://127\.0\.0\.1:\d+", line).group()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


@pytest.mark.slow
def test_an_unfinished_upload_does_not_keep_it_alive(finished_run):
    with served(finished_run) as (process, address):
        client = socket.create_connection((draw.HOST, int(address.rpartition(":")[2])))
        client.sendall(
            b"POST /beliefs?width=9&height=9 HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 81\r\n\r\nonly a part"
        )
        urllib.request.urlopen(f"{address}/about").close()  # the upload has arrived by then
    client.close()
    assert process.returncode == 0
    assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_and_shows_the_belief(finished_run, tmp_path):
    with served(finished_run) as (process, address):
        strokes = "0.5,0.15,0.5,0.4,0.5,0.85;0.4,0.25,0.5,0.15"
        command = [CHROMIUM, "--headless", "--disable-gpu", "--virtual-time-budget=15000"]
        command += ["--force-prefers-reduced-motion"]  # the last time step at once
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        command += [f"--user-data-dir={tmp_path}", "--dump-dom", f"{address}/?strokes={strokes}"]
        page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert process.returncode == 0
    assert "data-done" in page.stdout
    assert re.search(r"data-answer=\"\d\">\d \(\d+%\) after 28 of 28 time steps<", page.stdout)
