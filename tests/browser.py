"""Headless Chromium, asked through its debugging pipe; needs no package.

Source: the Chrome DevTools Protocol, https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
KEYS = {" ": ("Space", 32), "z": ("KeyZ", 90), "Delete": ("Delete", 46), "Tab": ("Tab", 9)}
KEYS |= {f"Arrow{name}": (f"Arrow{name}", 37 + i) for i, name in enumerate(("Left", "Up", "Right"))}


class Tab:
    """A tab of the browser; `events` are what it reported so far, such as requests."""

    def __init__(self, send, receive):
        self._send, self._receive, self._number, self._session = send, receive, 0, {}
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Calls a method of the protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _read(self):
        content = b""
        while not content.endswith(b"\0"):
            byte = self._receive.read(1)
            assert byte, "the browser has ended"
            content += byte
        return json.loads(content[:-1])

    def run(self, expression):
        """Evaluates JavaScript, also a promise."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, address, width=800, height=900, dark=False, phone=False):
        """Opens a page, and waits until it has drawn itself."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": height, "deviceScaleFactor": 1 + phone, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=address)
        self.wait()

    def wait(self):
        """Waits until the page has read the drawing."""
        done = "document.readyState === 'complete' && 'done' in document.body.dataset"
        self.run(
            "new Promise((resolve) => { const ask = () => "
            f"({done}) ? resolve() : setTimeout(ask, 20); ask(); }})"
        )

    def drag(self, points):
        """Draws with the mouse on the paper, from and to points in 0 to 1."""
        box = self.run(
            "(({x, y, width, height}) => [x, y, width, height])"
            "(document.querySelector('#paper').getBoundingClientRect())"
        )
        places = [{"x": box[0] + x * box[2], "y": box[1] + y * box[3]} for x, y in points]
        kinds = ["mousePressed", *["mouseMoved"] * (len(places) - 1), "mouseReleased"]
        for kind, place in zip(kinds, [*places, places[-1]], strict=True):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                button="left",
                clickCount=1,
                buttons=int(kind != "mouseReleased"),
                **place,
            )
        self.wait()

    def press(self, key, modifiers=0):
        """Presses a key of `KEYS`; a modifier 2 is Ctrl."""
        code, number = KEYS[key]
        what = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **what)
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)
        self.wait()

    def picture(self, whole=True):
        """Returns a screenshot, bytes of PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])


@contextlib.contextmanager
def tab(folder):
    """Yields a new `Tab`; the browser keeps its files in `folder`."""
    command = [CHROMIUM, "--headless", "--disable-gpu", "--remote-debugging-pipe"]
    command += [f"--user-data-dir={folder}", "--no-first-run", "--disable-background-networking"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    shell = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*shell, *command], **pipes) as process:
        try:
            yield Tab(process.stdin, process.stdout)
        finally:
            process.terminate()
