"""Every shipped config parses, and what should be light to import is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sppo_ray.config_io import flatten, load_config
from sppo_ray.layout import compute_layout
from sppo_ray.plan import make_plan, refuse_unfit
from sppo_ray.presets import preset

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ON_GPUS = [path for path in CONFIGS if yaml.safe_load(path.read_text()).get("cluster", {}).get("gpus")]
NAMES = [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_config_parses_and_has_a_layout(path: Path) -> None:
    compute_layout(load_config(path))


@pytest.mark.parametrize("path", ON_GPUS, ids=[path.stem for path in ON_GPUS])
def test_gpu_config_says_nothing_that_holds_anyway(path: Path) -> None:
    """A value repeated from a default or preset looks like a choice, and goes stale when the default moves."""
    config = load_config(path)
    used = flatten(config.model_dump(mode="json"))
    for key in flatten(yaml.safe_load(path.read_text())):
        section, name = key.split(".")
        default = (
            type(getattr(config, section)).model_fields[name].default
        )  # PydanticUndefined where a value is required
        assert preset(config.fidelity).get(key, default) != used[key], f"{key}={used[key]} holds anyway"


@pytest.mark.parametrize("path", ON_GPUS, ids=[path.stem for path in ON_GPUS])
def test_gpu_config_fits_its_gpus_and_has_known_steps(path: Path) -> None:
    plan = make_plan(load_config(path))
    refuse_unfit(plan)
    assert plan.layout.kind == "colocated"
    assert [iteration.steps for iteration in plan.iterations] == [309, 312, 313]
    learner = plan.config.learner
    assert learner.batch_size % (learner.num_workers * learner.micro_batch_size) == 0


def test_authors_batches() -> None:
    batches = {path.stem: load_config(path).learner.micro_batch_size for path in ON_GPUS}
    assert batches == {"mistral_7b": 8, "llama3_8b": 8, "gemma2_9b": 4}  # 8x1, 8x1, 4x2 on 8 GPUs


def _imported_by(code: str) -> set[str]:
    """Top-level modules after running `code` in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_config_and_plan_import_no_torch() -> None:
    loaded = _imported_by("import sppo_ray.config, sppo_ray.config_io, sppo_ray.layout, sppo_ray.memory")
    assert not loaded & {"torch", "transformers", "ray", "vllm", "deepspeed"}


def test_the_pure_package_imports_no_ray_vllm_or_deepspeed() -> None:
    loaded = _imported_by(
        "import importlib, pkgutil, sppo_ray\n"
        "for module in pkgutil.walk_packages(sppo_ray.__path__, 'sppo_ray.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
    )
    assert "sppo_ray" in loaded
    assert not loaded & {"ray", "vllm", "deepspeed"}


def test_runtime_env_gives_a_stopped_job_time_and_leaves_runs_behind() -> None:
    environment = yaml.safe_load((ROOT / "configs" / "ray" / "runtime_env.yaml").read_text())
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    assert "/runs/" in environment["excludes"]
