"""Lines that prove themselves, and names that no two writers share."""

from __future__ import annotations

import pytest

from sppo_ray.atomic import LineFile, read_checked_lines, read_lines, whole_file

LINES = [{"step": n, "groups": [[n + 12, 0], [n + 40, 1]]} for n in range(3)]


@pytest.fixture
def path(tmp_path):
    file = LineFile(tmp_path / "lines.jsonl", checked=True)
    for line in LINES:
        file.append(line)
    return file.path


def test_checked_lines_are_json_lines_too(path):
    assert read_checked_lines(path) == LINES
    plain = read_lines(path)
    assert [set(line) - {"xxh3"} for line in plain] == [{"step", "groups"}] * 3
    assert len({line["xxh3"] for line in plain}) == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"[13, 0]", b"[12, 0]"), (b'"step": 1', b'"step": 2'), (b"[13, 0]", b"[13,0]"), (b'"xxh3": "', b'"xxh2": "')],
)
def test_a_damaged_line_ends_what_is_read_and_is_written_over(path, caplog, before, after):
    first, second, third = path.read_bytes().splitlines(keepends=True)
    assert before in second
    path.write_bytes(first + second.replace(before, after) + third)
    assert read_checked_lines(path) == LINES[:1]
    assert "line 2" in caplog.text
    again = LineFile(path, checked=True)
    again.append(LINES[1])
    assert read_checked_lines(path) == LINES[:2]


@pytest.mark.parametrize("torn", [1, 30, -1])
def test_a_torn_checked_line_is_left_out(path, torn, caplog):
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    path.write_bytes(data[: last + torn] if torn > 0 else data[:torn])
    assert read_checked_lines(path) == LINES[:2]
    assert caplog.text == ""  # a crash, no damage


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "state.json"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("a longer first")
        other.write_text("second")
        assert one.read_text() == "a longer first"
        assert set(tmp_path.glob(".*.tmp")) == {one, other}  # by which what is left of a killed one is cleared
    assert path.read_text() == "a longer first"
    assert list(tmp_path.iterdir()) == [path]
