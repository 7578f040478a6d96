"""A headless Chromium that opens a page from the disk and is asked about it, through a pipe."""

import base64
import fcntl
import json
import os
import shutil
from pathlib import Path

CHROMIUM = shutil.which("chromium")


class Browser:
    """`with Browser(folder) as b`: `open` a page, `run` JavaScript; `errors` is what it complained
    of, and `requests` the addresses it asked for."""

    def __init__(self, profile: Path, size=(1400, 900), dark=False, args=()):
        # the browser reads from its third descriptor and writes to its fourth
        ends = [end for pipe in (os.pipe(), os.pipe()) for end in pipe]
        there, self._to, self._from, back = (fcntl.fcntl(e, fcntl.F_DUPFD_CLOEXEC, 9) for e in ends)
        none = os.open(os.devnull, os.O_RDWR)
        places = [(none, 0), (none, 1), (none, 2), (there, 3), (back, 4)]
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                 "--no-first-run", f"--user-data-dir={profile}", *args]  # fmt: skip
        self._process = os.posix_spawn(
            CHROMIUM or "/usr/bin/chromium",
            ["chromium", *flags],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, ours, its) for ours, its in places],
        )
        for end in (*ends, there, back, none):
            os.close(end)
        self._id, self._read, self._session = 0, b"", None
        self.errors, self.requests, self.fired = [], [], set()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(*size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._session = None
            self.send("Browser.close")
        except (EOFError, BrokenPipeError):
            pass
        finally:
            os.close(self._to)
            os.close(self._from)
            os.waitpid(self._process, 0)

    def send(self, method, **params):
        """A command of the DevTools protocol, and its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._id:
            self._note(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _next(self):
        while b"\0" not in self._read:
            if not (more := os.read(self._from, 1 << 20)):
                raise EOFError("the browser has ended")
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        method, params = event.get("method"), event.get("params", {})
        self.fired.add(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:2000])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def resize(self, width, height, mobile=False):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=mobile,
        )  # fmt: skip

    def open(self, page: Path | str):
        """Opens a page, a file or an address, and waits until its scripts have run."""
        self.fired.clear()
        url = page if isinstance(page, str) else page.resolve().as_uri()
        self.send("Page.navigate", url=url)
        while "Page.loadEventFired" not in self.fired:
            self._note(self._next())
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, script):
        """The value of an expression in the page; a promise's when it has one."""
        answer = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            more["windowsVirtualKeyCode"] = {"Escape": 27, "Enter": 13}.get(key, 0)
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **more)

    def mouse(self, kind, x, y, **more):
        """`kind`: Pressed, Moved, Released or Wheel."""
        button = {"button": "left", "clickCount": 1} if kind in ("Pressed", "Released") else {}
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **button, **more)

    def click(self, x, y):
        self.mouse("Moved", x, y)
        self.mouse("Pressed", x, y)
        self.mouse("Released", x, y)

    def picture(self, path: Path):
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
