"""Who may talk to the cluster: the token, the loopback interface, and the refusal of a cluster that lets anyone in.

Whoever may submit to a Ray cluster runs code on it. Ray's only border is its token; see SECURITY.md.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Literal

import grpc
import psutil
from ray._common.tls_utils import load_certs_from_env
from ray._private import ray_constants
from ray._private.services import build_address, canonicalize_bootstrap_address, parse_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # not in its stub file
from ray.exceptions import RpcError

from sppo_ray.atomic import whole_file
from sppo_ray.errors import ConfigError

Answer = Literal["open", "guarded", "silent"]
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # where it is 0, Ray takes a node's address to be the loopback's
REMEDY = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the same token file on every machine, for this command too "
    "(configs/ray/README.md)"
)


def ensure_token() -> str | None:
    """A local ray.init() switches token authentication on unless told otherwise, and makes a token readable by everyone on
    the machine if there is none: so make it first, for this user alone. Raises ConfigError where it cannot be kept. Returns a
    warning where the environment switches tokens off."""
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")) != "token":
        return f"RAY_AUTH_MODE={mode}: the Ray of this run asks for no token; every user of this machine can run code in it"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = _token_file()
    try:
        if path.exists() and path.stat().st_size:  # an empty one is of a writer that was killed
            close_token()
            return None
        with (
            whole_file(path) as temporary,
            os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
        ):
            file.write(secrets.token_hex(32))
    except OSError as error:
        raise ConfigError(
            f"the token for Ray cannot be kept at {path} ({error.strerror}): set RAY_AUTH_TOKEN_PATH to a file of your own that can "
            "be written."
        ) from None
    return None


def close_token() -> None:
    """A file of this user's that everyone can read, as Ray itself leaves it. One that is shared with a group is left alone."""
    path = _token_file()
    with suppress(OSError):  # there is none, or it is on a read-only mount, e.g. of a cluster's secrets
        if path.is_file() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o007:
            path.chmod(0o600)


def _token_file() -> Path:
    """Ray takes an empty variable for none, and so for its default."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def stay_on_loopback() -> None:
    """Make the Ray that this process starts, or joins by a loopback address, keep to the loopback interface.

    Ray turns 127.0.0.1 into the machine's address, and its servers listen on what they think is the node's. The switch that
    stops this was made for systems with pop-up firewalls; Ray reads it when it is imported, its child processes when they start.
    gloo, among the learner's and vLLM's ranks, would listen on what the machine's name stands for; a Ray that starts here hands
    its variable on.
    """
    os.environ[LOOPBACK_ONLY] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    interfaces = psutil.net_if_addrs().items()
    os.environ["GLOO_SOCKET_IFNAME"] = next(
        name for name, entries in interfaces if any(entry.address == "127.0.0.1" for entry in entries)
    )


def refuse_open_cluster(address: str, allowed: bool) -> str | None:
    """Raise ConfigError if others than this machine's users could run code on the cluster at `address` without a token, or
    if it asks for one that this process lacks. `allowed`: cluster.allow_unauthenticated; then a warning is returned."""
    server = resolve(address)
    answer = knock(server)
    if answer == "silent":
        raise ConfigError(
            f"no Ray cluster answers at {server} (cluster.address={address}): start it, or correct the address."
        )
    if answer == "guarded" and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(f"the Ray cluster at {server} asks for a token and this process uses none: {REMEDY}.")
    reached_at = answering_beyond_loopback(server) if answer == "open" and is_loopback(server) else server
    if answer == "guarded" or reached_at is None:
        return None
    found = f"the Ray cluster at {reached_at} asks for no token: anyone who reaches it can run code on it"
    if not allowed:
        raise ConfigError(
            f"{found}. Start it again with a token: {REMEDY}. If everyone on its network may run code there, set "
            "cluster.allow_unauthenticated=true."
        )
    return f"{found} (cluster.allow_unauthenticated=true)"


def resolve(address: str) -> str:
    """host:port of the GCS that ray.init(address) would join. Raises ConfigError if `address` means none."""
    if "://" in address:
        raise ConfigError(
            f"cluster.address={address}: only host:port and auto can be joined; from outside the cluster use `ray job submit`."
        )
    try:
        if parse_address(address) and is_loopback(address) and knock(address) != "silent":
            stay_on_loopback()  # a head that is on loopback alone does not answer at the machine's own address
        server: str | None = canonicalize_bootstrap_address(address)
    except ValueError as error:
        raise ConfigError(f"cluster.address={address} is not host:port or auto ({error}).") from None
    if server is None:
        raise ConfigError(
            f"cluster.address={address} names no running cluster: give its host:port, or null to start one on this machine."
        )
    return server


def knock(server: str, timeout_s: float = 20.0) -> Answer:
    """How the GCS at host:port answers a caller without a token (over TLS where Ray itself speaks it)."""
    refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    no_answer = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    options = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        chain, key, authority = load_certs_from_env()
        channel = grpc.secure_channel(server, grpc.ssl_channel_credentials(authority, key, chain), options=options)
    else:
        channel = grpc.insecure_channel(server, options=options)
    with channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code()
            return "guarded" if code in refused else "silent" if code in no_answer else "open"
    return "open"


def answering_beyond_loopback(server: str) -> str | None:
    """host:port at which an open cluster whose GCS is at a loopback host:port lets in callers from other machines too. A head that
    was started with --node-ip-address=127.0.0.1 alone listens on all interfaces, and so does a dashboard with
    --dashboard-host=0.0.0.0: its job API runs whatever it is sent."""
    gcs, dashboard = (parse_address(server) or ("", server))[1], _dashboard_port(server)
    for host in own_addresses():
        if knock(own := build_address(host, gcs)) == "open":
            return own
        if dashboard and _listens(host, dashboard):
            return build_address(host, dashboard)
    return None


def _dashboard_port(server: str) -> str | None:
    """Of the open cluster at host:port, as its GCS tells everyone; None if it has no dashboard."""
    try:
        found = GcsClient(address=server).internal_kv_get(
            ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD, timeout=20
        )
    except RpcError as error:
        raise ConfigError(f"the Ray cluster at {server} does not say where its dashboard is ({error}).") from None
    return (parse_address(found.decode()) or ("", None))[1] if found else None


def _listens(host: str, port: str) -> bool:
    try:
        with socket.create_connection((host, int(port)), timeout=20):
            return True
    except OSError:
        return False


def own_addresses() -> list[str]:
    """Of this machine's network interfaces, without the loopback's and those that are valid on one link only."""
    every = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
    found = [entry.address.partition("%")[0] for entry in every if entry.family in (socket.AF_INET, socket.AF_INET6)]
    parsed = [ipaddress.ip_address(address) for address in found]
    return [str(address) for address in parsed if not (address.is_loopback or address.is_link_local)]


def is_loopback(server: str) -> bool:
    """Whether every address that the host of host:port stands for is the loopback's."""
    host = (parse_address(server) or (server, ""))[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)
