"""The drawing page: what it asks by the library's test client, and the page in a real browser."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

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


def test_the_page_and_what_it_is_told(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "pointerdown" in page.text
    assert not re.search(r"(src|href)=\"(?!data:)", page.text)  # nothing from elsewhere
    about = client.get("/about").json()
    assert about["time_steps"] == 28
    assert about["read_at"] == [i // 28 for i in range(784)]
    assert "simple_rnn(8)" in about["network"]


def test_a_drawing_is_answered_as_its_prepared_image(client, network):
    drawing = np.full((300, 200), 255, np.uint8)
    drawing[40:260, 90:115] = 0
    answer = client.post("/beliefs?width=200&height=300", content=drawing.tobytes()).json()
    image = images.prepare(drawing, "drawing")
    np.testing.assert_array_equal(np.reshape(answer["image"], (28, 28)), image)
    beliefs = network.beliefs(image[None])[:, 0]
    np.testing.assert_allclose(answer["beliefs"], beliefs, atol=1e-4)
    assert answer["class"] == beliefs[-1].argmax()


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


@contextlib.contextmanager
def served(workdir, *arguments):
    command = [sys.executable, "-m", "tools.draw", f"--workdir={workdir}", *arguments]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_and_shows_the_belief(finished_run, tmp_path):
    with served(finished_run, "--port=0") as (process, line):
        address = re.search(r"http://127\.0\.0\.1:\d+", line).group()
        strokes = "0.5,0.15,0.5,0.4,0.5,0.85;0.4,0.25,0.5,0.15"
        command = [CHROMIUM, "--headless", "--disable-gpu", "--virtual-time-budget=15000"]
        command += ["--force-prefers-reduced-motion"]  # the last time step at once
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        command += [f"--user-data-dir={tmp_path}", "--dump-dom", f"{address}/?strokes={strokes}"]
        page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        port = address.rpartition(":")[2]
        again = subprocess.run(
            [sys.executable, "-m", "tools.draw", f"--workdir={finished_run}", f"--port={port}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert process.returncode == 0
    assert "data-done" in page.stdout
    assert re.search(r"data-answer=\"\d\">\d \(\d+%\) after 28 of 28 time steps<", page.stdout)
    assert again.returncode == 2
    assert f"--port={port} is in use" in again.stderr.splitlines()[-1]
