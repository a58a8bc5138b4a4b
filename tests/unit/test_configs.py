"""Every shipped config parses, and what should be light to import is."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
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
    config = load_config(path)
    layout = compute_layout(config)
    assert layout.gpus == config.cluster.gpus
    workers = [section.num_workers for section in (config.rollout, config.judge, config.learner)]
    assert [role.workers for role in (layout.rollout, layout.judge, layout.learner)] == workers


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
    assert plan.layout.kind == ("disaggregated" if path.stem.endswith("_async") else "colocated")
    assert [iteration.steps for iteration in plan.iterations] == [309, 312, 313]
    learner = plan.config.learner
    assert learner.batch_size % (learner.num_workers * learner.micro_batch_size) == 0


def test_authors_batches() -> None:
    sync = [path for path in ON_GPUS if not path.stem.endswith("_async")]
    batches = {path.stem: load_config(path).learner.micro_batch_size for path in sync}
    assert batches == {"mistral_7b": 8, "llama3_8b": 8, "gemma2_9b": 4}  # 8x1, 8x1, 4x2 on 8 GPUs


def _imported_by(code: str) -> set[str]:
    """Top-level modules after running `code` in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_config_and_plan_import_no_torch() -> None:
    """Not even when a plan is made and shown: refusing bad input should take no longer than reading it."""
    loaded = _imported_by(
        "from pathlib import Path\n"
        "from sppo_ray.config_io import load_config\n"
        "from sppo_ray.plan import make_plan, refuse_unfit, render_plan\n"
        "plan = make_plan(load_config(Path('configs/mistral_7b.yaml')))\n"
        "refuse_unfit(plan)\n"
        "render_plan(plan)\n"
        "import sppo_ray.cli"
    )
    assert "sppo_ray" in loaded
    assert not loaded & {"torch", "transformers", "ray", "vllm", "deepspeed", "datasets"}


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


@pytest.mark.parametrize("name", ["mistral_7b_async", "llama3_8b_async", "gemma2_9b_async"])
def test_async_config_fits_four_gpus_as_its_comment_says(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    (overrides,) = re.findall(r"On 4 GPUs: (.+)", path.read_text())
    plan = make_plan(load_config(path, overrides.split()))
    assert plan.layout.gpus == 4
    refuse_unfit(plan)


@pytest.mark.parametrize("name", ["tiny_cpu_async", "mistral_7b_async"])
def test_async_config_trains_what_the_sync_one_does(name: str) -> None:
    """Only where and when things run differs; what is computed is the same, but for the reference and the prompts' length."""
    ours = flatten(load_config(ROOT / f"configs/{name}.yaml").model_dump(mode="json"))
    sync = flatten(load_config(ROOT / f"configs/{name.removesuffix('_async')}.yaml").model_dump(mode="json"))
    differs = {key for key in ours if ours[key] != sync[key] and key.split(".")[0] not in ("run", "cluster", "weights")}
    where = {
        "learner.micro_batch_size",
        "rollout.num_workers",
        "judge.num_workers",
        "learner.num_workers",
        "rollout.gpu_memory_utilization",
    }
    assert differs <= where | {
        "schedule.mode",
        "schedule.max_staleness",
        "objective.reference",
        "rollout.in_flight",
        "rollout.max_model_len",
    }


def test_the_lock_file_holds_what_pyproject_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [text for text in (*project["dependencies"], *project["optional-dependencies"]["cpu"]) if "==" in text]
    wanted = {re.sub(r"\[.*?\]", "", text) for text in pins}
    lock = set((ROOT / "requirements/cpu.lock").read_text().split())
    lock.add(re.search(r'^TORCH="(\S+)"', (ROOT / "scripts/setup.sh").read_text(), re.MULTILINE)[1])
    assert len(wanted) >= 8
    assert wanted <= lock
