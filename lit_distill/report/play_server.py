"""Serves the page of `lit-distill play` on this machine, with the standard library alone."""

from __future__ import annotations

import json
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jinja2

from lit_distill.errors import InputError
from lit_distill.report.play import CONTENDERS, MAX_SEED, MAX_STEPS, Playground
from lit_distill.version import __version__

LONGEST_REQUEST = 2**16
"""Bytes."""

LOCAL = ("127.0.0.1", "localhost", "::1")


class PlayServer(ThreadingHTTPServer):
    """The page at ``/``, and images at ``/sample``.

    Args:
        playground: Samples the images.
        host: Address to listen on.
        port: Port to listen on; 0: any that is free.

    Raises:
        InputError: If nothing can listen there, as when another program does.
    """

    daemon_threads = True

    def __init__(self, playground: Playground, host: str = "127.0.0.1", port: int = 7860) -> None:
        self.playground = playground
        self.host = host
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"can't listen on port {port} of {host}: {error}; name another with --port, from "
                "1024 to 65535, or 0 for any that is free"
            ) from error

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{self.host}:{self.server_port}/"

    def page(self) -> str:
        """Return the page."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("lit_distill", "assets"), autoescape=True
        )
        facts = self.playground.facts
        return environment.get_template("play.html.j2").render(
            title=self.playground.title,
            version=__version__,
            contenders=CONTENDERS,
            prompt=facts.examples[0].prompt,
            seed=facts.examples[0].seed,
            steps=facts.num_inference_steps,
            teacher_steps=self.playground.teacher_settings[0],
            max_seed=min(MAX_SEED, 2**53 - 1),  # JavaScript rounds larger integers
            max_steps=MAX_STEPS,
        )

    def is_local_name(self, host: str) -> bool:
        """Return whether a request names this machine: other sites' pages can't read the answer."""
        name = host.rpartition(":")[0] if not host.endswith("]") else host
        return self.host not in LOCAL or (name or host).strip("[]") in LOCAL


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: PlayServer

    def do_GET(self) -> None:
        """Send the page."""
        if not self.server.is_local_name(self.headers.get("Host", "")):
            self._send(403, "text/plain", b"this page is for this machine only")
        elif self.path == "/":
            self._send(200, "text/html; charset=utf-8", self.server.page().encode())
        else:
            self._send(404, "text/plain", b"there is only one page here: /")

    def do_POST(self) -> None:
        """Sample an image; an error is sent as text, for the page to show."""
        # Pages of other sites can't send this type without asking first, which is not answered.
        kind = self.headers.get("Content-Type", "")
        if kind != "application/json" or not self.server.is_local_name(
            self.headers.get("Host", "")
        ):
            self._send(403, "text/plain", b"only the page of lit-distill play may ask")
            return
        status, answer = self._sample()
        self._send(status, "application/json", json.dumps(answer).encode())

    def _sample(self) -> tuple[int, dict[str, Any]]:
        try:
            length = int(self.headers.get("Content-Length", 0))
            if length > LONGEST_REQUEST:
                raise InputError(f"the request is longer than {LONGEST_REQUEST} bytes")
            wanted = json.loads(self.rfile.read(length))
            if not isinstance(wanted, dict):
                raise InputError("the request must be a mapping, as the page sends it")
            values: list[Any] = [wanted.get(k) for k in ("contender", "prompt", "seed", "steps")]
            return 200, self.server.playground.sample(*values)
        except (InputError, json.JSONDecodeError) as error:
            return 400, {"error": str(error)}
        except Exception as error:  # of the pipeline: the page shows it, the terminal has it all
            traceback.print_exc()
            return 500, {"error": f"{type(error).__name__}: {error}"}

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401
        """Print nothing for each request."""
