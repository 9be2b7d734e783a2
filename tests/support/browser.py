"""A real headless Chromium, driven by the WebDriver protocol over plain HTTP: nothing to install but the browser."""

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_browser() -> tuple[str, str] | None:
    """Paths of Chromium (or Chrome) and its driver, if both are installed."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Page:
    """One tab."""

    def __init__(self, url: str) -> None:
        self._url = url

    def command(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        """One WebDriver command; its value."""
        data = json.dumps(body or {}).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, file: Path, *, width: int, height: int = 1000, dark: bool = False) -> None:
        """Show a local file in a window of that size."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.command("/url", {"url": file.as_uri()})

    def devtools(self, method: str, params: dict[str, Any]) -> Any:
        """One command of the DevTools protocol."""
        return self.command("/goog/cdp/execute", {"cmd": method, "params": params})

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.command("/execute/sync", {"script": f"return {expression}", "args": []})

    def logged(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: "browser" (console) or "performance" (network events)."""
        entries: list[dict[str, Any]] = self.command("/se/log", {"type": kind})
        return entries


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with a fresh profile; gone at the end."""
    found = find_browser()
    assert found
    binary, driver = found
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout
        port = next(match[1] for line in process.stdout if (match := re.search(r"successfully on port (\d+)", line)))
        root = Page(f"http://127.0.0.1:{port}")
        options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        session = root.command("/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        page = Page(f"http://127.0.0.1:{port}/session/{session}")
        try:
            yield page
        finally:
            page.command("", method="DELETE")
    finally:
        process.terminate()
        process.wait(timeout=10)
