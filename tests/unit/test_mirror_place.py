"""Where a mirror may be: what cannot be one is refused before anything starts."""

from __future__ import annotations

import pytest
from groups import config

from sppo_ray.errors import ConfigError
from sppo_ray.mirror import check_mirror
from sppo_ray.run_dir import claim


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("backups/run", "not a URL"),
        ("file://", "not a URL"),
        ("://x", "not a URL"),
        ("zip:///nowhere.zip", "cannot be used"),
        ("file://{root}/../run/mirror", "lies in run.dir"),
        ("file://{link}", "lies in run.dir"),
        ("file://{circle}", "does not answer"),
        ("file://{full}", "holds other things \\(thesis.tex\\)"),
        ("nosuch://bucket/run", "nosuch"),
        ("simplecache::s3://bucket/run", "one folder"),
        ("file://{root}", "lies in run.dir"),
        ("file://{root}/mirror", "lies in run.dir"),
        ("file://{other}", "holds another run"),
        ("file://{app}", "holds another run"),
        ("file://{conf}", "holds other things \\(config.yaml\\)"),
    ],
)
def test_a_mirror_that_cannot_be_is_refused(tmp_path, url, message):
    claim(config(tmp_path / "other"), {})
    (tmp_path / "other/manifest.json").write_text('{"started": "long ago"}')
    for name, file in (("app", "manifest.json"), ("conf", "config.yaml")):  # not of a run
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"name": "my app"}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    url = url.format(
        root=tmp_path / "run", **{name: tmp_path / name for name in ("other", "link", "full", "circle", "app", "conf")}
    )
    with pytest.raises(ConfigError, match=message):
        check_mirror(config(tmp_path / "run", run__mirror=url))


def test_no_mirror_and_a_new_one_are_fine(tmp_path):
    check_mirror(config(tmp_path / "run"))
    check_mirror(config(tmp_path / "run", run__mirror=f"file://{tmp_path}/backup"))
    check_mirror(config(tmp_path / "run", run__mirror="memory://bucket"))
    claim(config(tmp_path / "run"), {})
    (tmp_path / "backup/iter_1").mkdir(parents=True)  # by a driver that was killed in its first pass
    (tmp_path / "backup/lost+found").mkdir()  # the root of a volume
    (tmp_path / "backup/.snapshot").mkdir()
    check_mirror(config(tmp_path / "run", run__mirror=f"file://{tmp_path}/backup"))
