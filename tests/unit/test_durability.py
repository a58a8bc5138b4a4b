"""What may be relied on after a loss of power: a name appears when the content under it, and then the name itself, is on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from actors.policy_folder import write_policy
from sppo_ray.atomic import LineFile, make_folder, remove_folder, write_bytes, write_json
from sppo_ray.checkpoints import new_checkpoint
from sppo_ray.storage import Storage


class PowerLoss:
    """Knows what fsync was asked for, and looks at every name that appears. A file's state is its size and time, a folder's its
    names: what was changed since the last fsync is lost with the power."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on_disk: dict[Path, object] = {}
        self.appeared: list[Path] = []
        fsync, replace, rename = os.fsync, os.replace, os.rename

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.on_disk[path] = self._state(path)

        def moved(move: Callable[..., None]) -> Callable[..., None]:
            def checked(source: Path, target: Path) -> None:
                goes_away = Path(target).name.startswith(".")
                if not goes_away:
                    self._must_be_on_disk(Path(source), called=Path(target))
                move(source, target)
                now = {
                    path: Path(target) / path.relative_to(source) for path in self.known if path.is_relative_to(source)
                }
                self.on_disk = {now.get(path, path): state for path, state in self.on_disk.items()}
                self.appeared = [now.get(path, path) for path in self.appeared]
                if not goes_away:
                    self.appeared.append(Path(target))

            return checked

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", moved(replace))
        monkeypatch.setattr(os, "rename", moved(rename))

    @property
    def known(self) -> set[Path]:
        return {*self.on_disk, *self.appeared}

    def _state(self, path: Path) -> object:
        return sorted(os.listdir(path)) if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)

    def _must_be_on_disk(self, path: Path, called: Path) -> None:
        for part in (path, *path.rglob("*")):
            assert self.on_disk.get(part) == self._state(part), f"{part} is called {called} before it is on disk"

    def names_are_on_disk(self) -> bool:
        """Of all that appeared."""
        return bool(self.appeared) and all(
            self.on_disk.get(path.parent) == self._state(path.parent) for path in self.appeared
        )


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> PowerLoss:
    return PowerLoss(monkeypatch)


@pytest.mark.parametrize("write", [lambda path: write_bytes(path, b"x"), lambda path: write_json(path, {"a": 1})])
def test_files(tmp_path: Path, power: PowerLoss, write: Callable[[Path], None]) -> None:
    for _ in range(2):  # the second time in the place of the first
        write(tmp_path / "folder/file")
        assert power.names_are_on_disk()
    assert power.on_disk[tmp_path] == ["folder"]


def test_checkpoints(tmp_path: Path, power: PowerLoss) -> None:
    for step in (3, 3, 4):  # the second time in the place of the first
        with new_checkpoint(tmp_path / "checkpoints", step, {}, keep=2) as folder:
            (folder / "state-00000.safetensors").write_bytes(b"state")
            (folder / "state-00001.safetensors").write_bytes(b"more")
        assert power.names_are_on_disk()
    assert power.on_disk[tmp_path] == ["checkpoints"]


@pytest.mark.parametrize("shard_bytes", [4 << 30, 8])
def test_policies(tmp_path: Path, power: PowerLoss, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    """In one shard, and in several with their index."""
    monkeypatch.setattr("actors.policy_folder.SHARD_BYTES", shard_bytes)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text('{"a": 1}')
    (tmp_path / "source/tokenizer.json").write_text("{}")
    tensors = [(f"layer{n}", torch.full((2,), float(n))) for n in range(3)]
    write_policy(tmp_path / "iter_1/policy", str(tmp_path / "source"), "float32", tensors, Storage())
    assert tmp_path / "iter_1/policy" in power.appeared
    assert power.names_are_on_disk()


def test_lines(tmp_path: Path, power: PowerLoss) -> None:
    path = tmp_path / "lines.jsonl"
    file = LineFile(path)
    for number in range(3):
        file.append({"n": number})
        assert power.on_disk[path] == power._state(path)
        assert power.on_disk[tmp_path] == ["lines.jsonl"]


def test_what_is_removed_loses_its_name_first(tmp_path: Path, power: PowerLoss) -> None:
    make_folder(tmp_path / "root")
    (tmp_path / "root/step-1").mkdir()
    names: list[object] = []
    rmtree = lambda path: names.append(power.on_disk.get(tmp_path / "root"))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", rmtree)
        remove_folder(tmp_path / "root/step-1")
    assert len(names) == 1
    assert "step-1" not in names[0]
