"""What a run counts of its misfortunes, over all its attempts and drivers: kept in manifest.json."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import Thread

from actors.build import Running
from sppo_ray.errors import SppoError
from sppo_ray.progress import RunProgress
from sppo_ray.run_dir import read_manifest, update_manifest
from sppo_ray.types import Look

HANGS_S = 60.0  # for the file server to take the counts
EVERY_S = 2.0  # what a killed driver loses of the counts


class Tally:
    """restarts, by role: times a worker, the learner's ranks, or all actors (`run`) were started again.
    groups_sampled: with those sampled again, and those that a worker died with. updates_repeated: updates the learner made again
    after a restart. Lower bounds: what a killed driver had not written yet, and the restarts of workers in an attempt that ended
    before all served, are not in them."""

    def __init__(self, root: Path, held: int) -> None:
        """After the run directory is claimed for this attempt. held: groups that are on disk already."""
        before = read_manifest(root)
        self.seen = Look({}, "", 0, 0)  # of the buffer, last
        self._root = root
        self._before = Counter(before.get("restarts", {}))
        self._before["run"] = len(before.get("resumed", []))
        self._sampled, self._repeated = max(held, before.get("groups_sampled", 0)), before.get("updates_repeated", 0)
        self._kept_at = time.monotonic()
        self._keeping: Thread | None = None

    def keep_now_and_then(self, now: Running, progress: RunProgress) -> None:
        """In a thread, which nobody waits for: it may hang with its file server."""
        if time.monotonic() - self._kept_at > EVERY_S and not (self._keeping and self._keeping.is_alive()):
            self._kept_at = time.monotonic()
            self._keeping = Thread(target=self._keep, args=(now, progress), name="tally", daemon=True)
            self._keeping.start()

    def keep(self, now: Running, progress: RunProgress) -> None:
        """Write the counts as they are, the last thing before others write to the manifest. A disk that refuses them, or does
        not show the manifest, is no reason to stop."""
        if self._keeping:
            self._keeping.join(HANGS_S)
        self._keep(now, progress)

    def _keep(self, now: Running, progress: RunProgress) -> None:
        here = {
            "rollout": now.rollout.restarts,
            "judge": now.judge.restarts,
            "learner": self.seen.learner_restarts,
            "run": 0,
        }
        restarts = {role: self._before[role] + count for role, count in here.items()}
        with suppress(OSError, SppoError):
            update_manifest(
                self._root,
                restarts=restarts,
                groups_sampled=self._sampled + progress.groups + now.rollout.lost_groups,
                updates_repeated=self._repeated + self.seen.updates_repeated,
            )
