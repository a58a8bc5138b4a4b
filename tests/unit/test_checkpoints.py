"""Checkpoints as files: whole or absent, checked, the newest kept, damaged ones set aside."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppo_ray.checkpoints import MARKER, Checkpoint, clear, fits, new_checkpoint, newest
from sppo_ray.types import ResumePoint

CONTENT = bytes(range(256)) * 8


def write(root: Path, step: int, keep: int = 9) -> Path:
    with new_checkpoint(root, step, {"writer": "test", "first": 10}, keep) as folder:
        (folder / "a.bin").write_bytes(CONTENT)
        (folder / "b.bin").write_bytes(str(step).encode())
    return root / f"step-{step}"


def any_of(_: Checkpoint) -> bool:
    return True


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def step_of(found: Checkpoint | None) -> int | None:
    return None if found is None else found.step


def test_what_is_written_is_found(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there" / "yet"
    write(root, 2)
    write(root, 10)
    found = newest(root, any_of)
    assert found == Checkpoint(root / "step-10", 10, {"writer": "test", "first": 10})
    assert names(found.folder) == [MARKER, "a.bin", "b.bin"]
    assert (found.folder / "b.bin").read_bytes() == b"10"


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", any_of) is None
    clear(tmp_path / "none")


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-10", "step-11"]


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with new_checkpoint(tmp_path, 4, {}, keep=1) as folder:
            (folder / "a.bin").write_bytes(b"half")
            raise OSError("disk full")

    write(tmp_path, 3)
    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert names(tmp_path) == ["step-3"]
    assert step_of(newest(tmp_path, any_of)) == 3


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 3)
    (tmp_path / ".step-4.77.tmp").mkdir()
    (tmp_path / ".step-4.77.tmp" / "a.bin").write_bytes(b"half")
    assert step_of(newest(tmp_path, any_of)) == 3
    assert names(tmp_path) == ["step-3"]


def test_what_a_killed_removal_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no damage, and not kept as such."""

    def killed_half_way(folder: Path) -> None:
        (folder / MARKER).unlink()
        raise KeyboardInterrupt

    for step in (3, 4):
        write(tmp_path, step)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed_half_way)
        with pytest.raises(KeyboardInterrupt):
            clear(tmp_path)
    assert step_of(newest(tmp_path, any_of)) == 3
    assert names(tmp_path) == ["step-3"]


def test_a_step_written_again_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with new_checkpoint(tmp_path, 3, {"second": True}, keep=2) as folder:
        (folder / "c.bin").write_bytes(b"c")
    found = newest(tmp_path, any_of)
    assert found is not None
    assert found.notes == {"second": True}
    assert names(found.folder) == [MARKER, "c.bin"]


def test_those_of_another_past_are_removed(tmp_path: Path) -> None:
    """Else one of them would be taken for this run's own when it comes to that step."""
    for step in (3, 5, 7):
        write(tmp_path, step)
    assert step_of(newest(tmp_path, lambda found: found.step < 6)) == 5
    assert names(tmp_path) == ["step-3", "step-5"]


def test_clear_leaves_what_was_set_aside(tmp_path: Path) -> None:
    (write(tmp_path, 4) / "a.bin").unlink()
    write(tmp_path, 3)
    newest(tmp_path, any_of)
    clear(tmp_path)
    assert names(tmp_path) == ["step-4.corrupt"]


def damaged(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.bin", CONTENT[:-1], f"a.bin has {len(CONTENT) - 1} bytes instead of {len(CONTENT)}"),
        ("a.bin", b"", "a.bin has 0 bytes"),
        ("a.bin", CONTENT[:100] + bytes([CONTENT[100] ^ 1]) + CONTENT[101:], "the checksum of a.bin is"),
        (MARKER, b'{"step": 7, "fi', "the COMPLETE file is damaged"),
        (MARKER, b"[]", "the COMPLETE file is damaged"),
        (MARKER, b"\xff\xfe", "the COMPLETE file is damaged"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, content: bytes, said: str
) -> None:
    write(tmp_path, 5)
    damaged(write(tmp_path, 7), file, content)
    with caplog.at_level(logging.ERROR):
        assert step_of(newest(tmp_path, any_of)) == 5
    assert said in caplog.text
    assert "step-7" in caplog.text
    assert names(tmp_path) == ["step-5", "step-7.corrupt"]


@pytest.mark.parametrize("file", ["b.bin", MARKER])
def test_a_missing_file_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str) -> None:
    (write(tmp_path, 7) / file).unlink()
    assert newest(tmp_path, any_of) is None
    assert file in caplog.text
    assert names(tmp_path) == ["step-7.corrupt"]


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 7).rename(tmp_path / "step-9")
    assert newest(tmp_path, any_of) is None


@given(data=st.data())
def test_no_bit_can_flip_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """In any file; in the marker a flip may leave the same JSON (white space), then nothing else may have changed."""
    root = tmp_path_factory.mktemp("flip")
    folder = write(root, 7)
    before = newest(root, any_of)
    file = data.draw(st.sampled_from(["a.bin", "b.bin", MARKER]))
    content = bytearray((folder / file).read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << (bit % 8)
    damaged(folder, file, bytes(content))
    after = newest(root, any_of)
    assert after is None or (file == MARKER and after == before)


@pytest.mark.parametrize(
    ("step", "start", "expected"),
    [
        (12, ResumePoint(10, "policy"), True),
        (10, ResumePoint(10, "policy"), False),  # nothing was trained yet
        (12, ResumePoint(10, "policy", up_to=12), True),
        (12, ResumePoint(10, "policy", up_to=11), False),  # its batch was lost
        (12, ResumePoint(0, "policy"), False),  # an iteration before was thrown away
        (12, ResumePoint(20, "policy"), False),  # its iteration is finished
    ],
)
def test_only_those_of_the_iteration_that_is_next_fit(step: int, start: ResumePoint, expected: bool) -> None:
    assert fits(Checkpoint(Path("unused"), step, {"first_step": 10}), start) is expected


def test_the_marker_is_readable_by_others(tmp_path: Path) -> None:
    marker = json.loads((write(tmp_path, 7) / MARKER).read_text())
    assert marker["step"] == 7
    assert marker["files"]["a.bin"]["bytes"] == len(CONTENT)
