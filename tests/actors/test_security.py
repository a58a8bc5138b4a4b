"""Who is let in, and what is written down: refusals by a real local Ray, as a run starts it, and a run with planted secrets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from actors import access
from sppo_ray.errors import ConfigError
from tests.actors.job_runs import LIMIT_S, PLANTED, ROOT, answers, free_port, head_of, listening, train, wait_for

pytestmark = pytest.mark.timeout(2 * LIMIT_S)

START = """
import json, sys
from pathlib import Path
import ray
from actors.cluster import connected
from sppo_ray.config_io import load_config
from sppo_ray.layout import compute_layout
config = load_config(Path("configs/tiny_cpu.yaml"), sys.argv[1:])
with connected(config, compute_layout(config)) as cluster:
    ray.get(ray.remote(lambda: None).remote())
    print(json.dumps([cluster.dashboard, ray.get_runtime_context().gcs_address]), flush=True)
    sys.stdin.read()
"""
JOIN = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print(ray.is_initialized())"


@dataclass(frozen=True)
class Local:
    """A Ray that `connected` started on this machine, and its token."""

    pid: int  # of the driver
    dashboard: str
    gcs: str
    token_file: Path

    @property
    def token(self) -> str:
        return self.token_file.read_text()

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)


def without_auth(**environ: str) -> dict[str, str]:
    """This process's environment with these variables for Ray's authentication."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | environ


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    home = tmp_path_factory.mktemp("home")
    process = subprocess.Popen(
        [sys.executable, "-c", START, f"run.dir={home / 'run'}"],
        cwd=ROOT, env=without_auth(HOME=str(home)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        dashboard, gcs = json.loads(process.stdout.readline())
        yield Local(process.pid, dashboard, gcs, home / ".ray" / "auth_token")
    finally:
        process.stdin.close()
        process.wait(timeout=120)


def test_the_token_is_for_this_user_alone(local: Local) -> None:
    assert local.token_file.stat().st_mode & 0o777 == 0o600
    assert len(local.token) == 64


def test_nothing_of_a_local_ray_listens_beyond_loopback(local: Local) -> None:
    found = listening(local.family())
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}
    assert not [entry for entry in found if not ip_address(entry[1]).is_loopback]


def test_what_gloo_opens_in_a_local_ray_is_on_loopback(local: Local) -> None:
    (interface,) = {process.environ()["GLOO_SOCKET_IFNAME"] for process in local.family() if process.name() == "raylet"}
    assert "127.0.0.1" in {entry.address for entry in psutil.net_if_addrs()[interface]}


def ask(url: str, token: str | None, body: dict[str, Any] | None = None) -> int:
    """HTTP status of a GET, or of a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/v0/actors", "/nodes?view=summary", "/api/cluster_status"])
def test_the_dashboard_and_the_job_api_refuse_callers_without_the_token(local: Local, path: str) -> None:
    assert [ask(local.dashboard + path, token) for token in (None, "0" * 64, local.token)] == [401, 403, 200]


def test_a_job_without_the_token_is_refused(local: Local) -> None:
    """That one with the token runs, test_job.py shows."""
    jobs, job = f"{local.dashboard}/api/jobs/", {"entrypoint": "true"}
    assert [ask(jobs, token, job) for token in (None, "0" * 64)] == [401, 403]
    assert ask(jobs, local.token, job) not in (401, 403)


def call(server: str, method: str, token: str | None) -> grpc.StatusCode:
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(server) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=120, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_gcs_refuses_callers_without_the_token(local: Local) -> None:
    method = "/ray.rpc.NodeInfoGcsService/CheckAlive"
    refused = grpc.StatusCode.UNAUTHENTICATED
    found = [call(local.gcs, method, token) for token in (None, "0" * 64, local.token)]
    assert found == [refused, refused, grpc.StatusCode.OK]


def test_drivers_without_the_token_cannot_join(local: Local) -> None:
    """With Ray's own client: no authentication, a wrong token, the right one."""
    quick = {"RAY_NUM_REDIS_GET_RETRIES": "2"}  # Ray's 20 tries take 20 s
    attempts = [
        quick | {"RAY_AUTH_MODE": "disabled"},
        quick | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(local.token_file)},
    ]
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, local.gcs],
            env=without_auth(**{access.LOOPBACK_ONLY: "0"}, **environ), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        for environ in attempts
    ]  # fmt: skip
    outputs = [driver.communicate(timeout=300)[0] for driver in drivers]
    assert [(driver.returncode == 0, output) for driver, output in zip(drivers, outputs, strict=True)] == [
        (False, b""), (False, b""), (True, b"True\n"),
    ]  # fmt: skip


def test_sppo_without_the_token_says_what_is_missing(local: Local, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sppo_ray", *train(tmp_path / "run"), f"cluster.address={local.gcs}"],
        cwd=ROOT, env=without_auth(HOME=str(tmp_path)), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"refused: the Ray cluster at {local.gcs} asks for a token" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_pages_that_start_a_head_say_the_same() -> None:
    """test_job.py starts it so, and looks at what it listens on."""
    variables, command = head_of("README.md")
    assert variables["RAY_AUTH_MODE"] == "token"
    others, longer = head_of("configs/ray/README.md")
    assert others.items() >= variables.items()
    assert [option for option in longer if not option.startswith("--num-gpus=")] == command


@pytest.fixture(scope="module")
def open_gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a GCS that asks for no token, on loopback."""
    import ray
    from ray._private.services import GCS_SERVER_EXECUTABLE

    folder, port = tmp_path_factory.mktemp("gcs"), free_port()
    command = [
        GCS_SERVER_EXECUTABLE, f"--log_dir={folder}", f"--session-dir={folder}", "--session-name=open",
        f"--gcs_server_port={port}", "--node-ip-address=127.0.0.1", "--metrics-agent-port=1",
        f"--ray-commit={ray.__commit__}", f"--node-id={'0' * 56}", "--config_list=e30=",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=without_auth(RAY_AUTH_MODE="disabled"))
    try:
        wait_for(lambda: answers(port), timeout=120)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_an_open_cluster_on_loopback_may_be_joined(open_gcs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test's Ray in this process would have its say in what 127.0.0.1 means.
    monkeypatch.setattr(access, "resolve", lambda address: address)
    monkeypatch.setattr(access, "own_addresses", lambda: [])  # whatever else listens on its port there
    assert access.knock(open_gcs) == "open"
    assert access.refuse_open_cluster(open_gcs, allowed=False) is None


def test_an_open_cluster_that_answers_beyond_loopback_is_refused(
    open_gcs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Beyond` is pretended: the test is not to open a port to the network."""
    monkeypatch.setattr(access, "resolve", lambda address: address)
    monkeypatch.setattr(access, "own_addresses", lambda: ["127.0.0.1"])
    monkeypatch.setattr(
        access, "knock", lambda server, _=0.0, real=access.knock: real(server, 60.0)
    )  # a busy machine's time
    with pytest.raises(ConfigError, match=rf"^the Ray cluster at {open_gcs} asks for no token"):
        access.refuse_open_cluster(open_gcs, allowed=False)
    assert "anyone who reaches it can run code on it" in str(access.refuse_open_cluster(open_gcs, allowed=True))


def test_an_open_cluster_whose_dashboard_answers_beyond_loopback_is_refused(
    open_gcs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GCS keeps to 127.0.0.1; a job API that others reach is as good. `Others` are pretended, at 127.0.0.2."""
    monkeypatch.setattr(access, "resolve", lambda address: address)
    monkeypatch.setattr(access, "own_addresses", lambda: ["127.0.0.2"])
    assert access.refuse_open_cluster(open_gcs, allowed=False) is None
    with socket.create_server(("127.0.0.2", 0)) as dashboard:
        address = f"127.0.0.2:{dashboard.getsockname()[1]}"
        access.GcsClient(address=open_gcs).internal_kv_put(b"dashboard", address.encode(), True, namespace=b"dashboard")
        with pytest.raises(ConfigError, match=rf"^the Ray cluster at {address} asks for no token"):
            access.refuse_open_cluster(open_gcs, allowed=False)
    assert access.refuse_open_cluster(open_gcs, allowed=False) is None  # nobody listens there any more


def test_own_addresses_are_those_that_others_can_reach() -> None:
    assert not [address for address in access.own_addresses() if access.is_loopback(address)]


def test_an_open_cluster_elsewhere_is_refused(open_gcs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Elsewhere` is pretended: the test is not to open a port to the network."""
    monkeypatch.setattr(access, "resolve", lambda address: address)
    monkeypatch.setattr(access, "is_loopback", lambda server: False)
    with pytest.raises(ConfigError) as refused:
        access.refuse_open_cluster(open_gcs, allowed=False)
    message = str(refused.value)
    assert message.startswith(
        f"the Ray cluster at {open_gcs} asks for no token: anyone who reaches it can run code on it."
    )
    assert "RAY_AUTH_MODE=token" in message
    assert "cluster.allow_unauthenticated=true" in message
    warning = access.refuse_open_cluster(open_gcs, allowed=True)
    assert warning is not None
    assert "anyone who reaches it can run code on it" in warning


def test_planted_secrets_are_nowhere_in_a_run(whole: tuple[Path, str]) -> None:
    """The run was made with PLANTED in its environment, and Ray's token."""
    run_dir, output = whole
    planted = [value.encode() for value in (*PLANTED.values(), os.environ["RAY_AUTH_TOKEN"])]
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"manifest.json", "config.yaml", "metrics.jsonl", "rollout-0.log"} <= {path.name for path in files}
    leaks = [path for path in files if any(value in path.read_bytes() for value in planted)]
    assert not leaks
    assert not any(value in output.encode() for value in planted)
