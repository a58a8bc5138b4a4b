"""What Ray Train is given as its file system: ours on the disk is what it sees, its own records stay in memory."""

import pickle
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem, FileType, PyFileSystem

from actors.train_reports import place

RECORD = b'{"checkpoint_results": []}'


@pytest.fixture
def files(tmp_path: Path) -> PyFileSystem:
    return place(str(tmp_path / "run"))["storage_filesystem"]


def written(files: FileSystem, path: Path) -> FileSystem:
    with files.open_output_stream(str(path)) as stream:
        stream.write(RECORD[:5])
        stream.write(RECORD[5:])
    return files


def kind(files: FileSystem, path: Path) -> FileType:
    return files.get_file_info([str(path)])[0].type


def test_place_is_the_run_directory(tmp_path: Path) -> None:
    given = place(str(tmp_path / "elsewhere" / ".." / "run"))
    assert (given["name"], given["storage_path"]) == ("run", str(tmp_path))


def test_a_record_can_be_read_again_and_is_not_on_the_disk(files: PyFileSystem, tmp_path: Path) -> None:
    path = tmp_path / "not made" / "records.json"
    assert kind(written(files, path), path) == FileType.File
    assert files.open_input_stream(str(path)).read() == RECORD
    assert list(tmp_path.iterdir()) == []


def test_another_process_begins_without_records(files: PyFileSystem, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    other = pickle.loads(pickle.dumps(written(files, path)))
    assert other == files  # else Ray Train refuses a checkpoint as being on another file system
    assert kind(other, path) == FileType.NotFound


def test_what_the_run_saved_is_seen(files: PyFileSystem, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_bytes(b"{}")
    assert kind(files, policy) == FileType.Directory
    assert files.open_input_stream(str(policy / "config.json")).read() == b"{}"
