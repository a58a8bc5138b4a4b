"""Ray Train's cleaner as this project uses it (actors/cleaner.py), in a Ray without a dashboard beside one that has it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, placement_group_table

from actors.cleaner import EndingCleaner

pytestmark = pytest.mark.timeout(300)


class KnowsNobody(BaseHTTPRequestHandler):
    """What another Ray's dashboard says of an actor that is not one of its own."""

    def do_GET(self) -> None:
        answer = {"result": [], "total": 0, "num_after_truncation": 0, "num_filtered": 0}
        body = json.dumps({"result": True, "msg": "", "data": {"result": answer}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def another_ray_s_dashboard(ray_local: None) -> Iterator[None]:
    """Where our Ray, which has none, has its own on record: 127.0.0.1:8265, were it not that this may be taken."""
    gcs = ray._private.worker.global_worker.gcs_client
    recorded = gcs.internal_kv_get(b"dashboard", b"dashboard")
    with HTTPServer(("127.0.0.1", 0), KnowsNobody) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        gcs.internal_kv_put(b"dashboard", f"127.0.0.1:{server.server_port}".encode(), True, b"dashboard")
        yield
        gcs.internal_kv_put(b"dashboard", recorded, True, b"dashboard")
        server.shutdown()


class Controller:
    def actor_id(self) -> str:
        return ray.get_runtime_context().get_actor_id()


def test_what_a_living_controller_has_is_left_and_a_dead_one_s_is_given_back(another_ray_s_dashboard: None) -> None:
    controller = ray.remote(num_cpus=0)(Controller).remote()
    group = placement_group([{"CPU": 0.01}])
    ray.get(group.ready())
    cleaner = ray.remote(num_cpus=0)(EndingCleaner).remote(
        ray.get(controller.actor_id.remote()), check_interval_s=0.1, get_actor_timeout_s=10, stop_timeout=10
    )
    ray.get(cleaner.register_placement_group.remote(group))
    time.sleep(3)  # for it to ask some times
    ray.get(cleaner.start_monitoring.remote())  # it is there
    assert placement_group_table(group)["state"] == "CREATED"

    ray.kill(controller)
    with pytest.raises(RayActorError):  # it ends
        ask_on(cleaner)
    assert placement_group_table(group)["state"] == "REMOVED"


def ask_on(cleaner: Any) -> None:
    while True:
        ray.get(cleaner.start_monitoring.remote())
        time.sleep(0.1)
