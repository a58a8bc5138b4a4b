"""Ray's token file, and which addresses are whose: without a Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from actors import access, cluster
from sppo_ray.config_io import load_config
from sppo_ray.errors import ConfigError
from sppo_ray.layout import compute_layout


def test_a_writer_that_was_killed_leaves_no_token_of_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ray/auth_token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))

    def killed(size: int) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(access.secrets, "token_hex", killed)
        with pytest.raises(KeyboardInterrupt):
            access.ensure_token()
    assert not path.exists()
    path.touch(mode=0o644)  # by one that wrote in place
    access.ensure_token()
    token = path.read_text()
    assert (len(token), path.stat().st_mode & 0o777) == (64, 0o600)
    path.chmod(0o644)  # as Ray itself makes one
    access.ensure_token()
    assert (path.read_text(), path.stat().st_mode & 0o777) == (token, 0o600)
    path.chmod(0o640)  # of several who use one cluster
    access.close_token()
    assert path.stat().st_mode & 0o777 == 0o640


def test_empty_variables_are_none_as_for_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files and CI leave such."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    access.close_token()
    access.ensure_token()
    assert len((tmp_path / ".ray/auth_token").read_text()) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path))
    access.close_token()
    assert tmp_path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("there", [True, False])
def test_a_token_that_everyone_can_read_is_closed_before_a_cluster_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    path = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    if there:
        path.touch(mode=0o644)
    modes = []
    monkeypatch.setattr(ray, "init", lambda *_, **__: modes.append(path.stat().st_mode & 0o777 if there else None))
    cluster._join("127.0.0.1:6379", "a-run")
    assert modes == [0o600 if there else None]


def test_a_run_whose_environment_switches_tokens_off_says_what_that_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_start", lambda *_: (_ for _ in ()).throw(ConnectionError("enough")))
    config = load_config(Path("configs/tiny_cpu.yaml"), [f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="enough"), cluster.connected(config, compute_layout(config)):
        pass
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("warning: RAY_AUTH_MODE=disabled: the Ray of this run asks for no token")


def test_a_token_that_cannot_be_kept_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/proc/nothing/token")
    with pytest.raises(ConfigError, match=r"cannot be kept at /proc/nothing/token .*set RAY_AUTH_TOKEN_PATH"):
        access.ensure_token()


@pytest.mark.parametrize(
    ("server", "loopback"),
    [("127.0.0.1:6379", True), ("127.9.9.9:1", True), ("[::1]:6379", True), ("localhost:6379", True),
     ("192.0.2.7:6379", False), ("0.0.0.0:6379", False), ("[2001:db8::1]:6379", False), ("no-such-host.invalid:1", False)],
)  # fmt: skip
def test_is_loopback(server: str, loopback: bool) -> None:
    assert access.is_loopback(server) == loopback


@pytest.mark.parametrize("address", ["local", "ray://192.0.2.7:10001", "192.0.2.7"])
def test_an_address_that_is_none_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=f"cluster.address={address}"):
        access.refuse_open_cluster(address, allowed=True)
