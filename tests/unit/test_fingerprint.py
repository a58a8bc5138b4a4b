"""Fingerprints follow content, not place."""

from __future__ import annotations

import shutil

from sppo_ray.fingerprint import BLOCK, fingerprint


def test_a_moved_folder_is_the_same_and_a_changed_file_is_not(tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    (one / "config.json").write_text("{}")
    (one / "weights").write_bytes(bytes(range(256)) * 100)
    shutil.copytree(one, tmp_path / "other")
    assert fingerprint(str(one)) == fingerprint(str(tmp_path / "other"))
    (tmp_path / "other/weights").write_bytes(bytes(range(255, -1, -1)) * 100)
    assert fingerprint(str(one)) != fingerprint(str(tmp_path / "other"))


def test_names_within_a_folder_count(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text("same")
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))


def test_every_byte_of_a_file_of_64_blocks_counts(tmp_path):
    path = tmp_path / "f"
    data = bytearray(64 * BLOCK)
    path.write_bytes(data)
    before = fingerprint(str(path))
    data[-1] = 1
    path.write_bytes(data)
    assert fingerprint(str(path)) != before


def test_a_hub_name_stands_for_itself():
    assert fingerprint("llm-blender/PairRM") == "llm-blender/PairRM"
