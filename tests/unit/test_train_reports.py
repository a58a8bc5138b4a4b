"""What Ray Train is given as its file system: ours on the disk is what it sees, its own records stay in memory."""

import pickle
import subprocess
import sys
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
    """As the controller of a run that goes on does, whatever the one before had listed."""
    path = tmp_path / "records.json"
    (tmp_path / "files.pickle").write_bytes(pickle.dumps(written(files, path)))
    script = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).get_file_info([sys.argv[2]])[0].type.name)"
    command = [sys.executable, "-c", script, str(tmp_path / "files.pickle"), str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "NotFound\n"


def test_what_the_run_saved_is_seen(files: PyFileSystem, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_bytes(b"{}")
    assert kind(files, policy) == FileType.Directory
    assert files.open_input_stream(str(policy / "config.json")).read() == b"{}"
