"""A headless Chromium, driven over its DevTools pipe: no driver, no port, no further package."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections import deque

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page in a Chromium that reaches no other machine.

    Attributes:
        problems: What the page's console said of errors, uncaught exceptions among them.
        requests: Addresses that were asked for, data: ones aside.
    """

    def __init__(self, width=1200, height=900):
        self.problems, self.requests = [], []
        self._events, self._buffer, self._number = deque(), b"", 0
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Chromium reads commands from file 3 and writes answers to file 4, each ended by a zero.
        its_in, self._to = os.pipe()
        self._from, its_out = os.pipe()
        options = f"--headless --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage \
            --remote-debugging-pipe --user-data-dir={self._profile.name} \
            --window-size={width},{height} \
            --host-resolver-rules='MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'"
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {CHROMIUM} {options} about:blank 3<&{its_in} 4>&{its_out}"],
            pass_fds=(its_in, its_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in), os.close(its_out)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.terminate()
        self._process.wait(10)
        os.close(self._to), os.close(self._from)
        self._profile.cleanup()

    def _read(self):
        while b"\0" not in self._buffer:
            block = os.read(self._from, 2**20)
            assert block, "Chromium has ended"
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _call(self, method, session=None, **params):
        self._number += 1
        command = {"id": self._number, "method": method, "params": params, **(session or {})}
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while (message := self._read()).get("id") != self._number:
            self._note(message)
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def call(self, method, **params):
        """Return what a command of the DevTools protocol, sent to the page, answers."""
        return self._call(method, self._session, **params)

    def _note(self, event):
        params = event["params"]
        self._events.append(event["method"])
        if event["method"] == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"])
        if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(params["args"])
        if event["method"] == "Log.entryAdded" and params["entry"]["level"] != "info":
            self.problems.append(params["entry"])
        if event["method"] == "Network.requestWillBeSent":
            url = params["request"]["url"]
            self.requests += [] if url.startswith("data:") else [url]

    def open(self, path):
        """Open a file and wait until it is loaded."""
        self.open_url(path.resolve().as_uri())

    def open_url(self, url):
        """Open an address and wait until it is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            self._note(self._read())

    def run(self, script):
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path):
        """Save what the window shows as a PNG."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
