"""What every actor process does first: environment, log file and memory. Imported before torch, vllm or deepspeed."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from pathlib import Path

import ray

import sppo_ray
from sppo_ray.layout import Assignment, Role
from sppo_ray.secrets import HidingStream, hide_in_logs

logger = logging.getLogger(__name__)
KERNELS, JUDGE_KERNELS = 32, 8  # oneDNN's, see `environment`


def environment(gpus: bool, threads: int, kernels: int = KERNELS) -> dict[str, str]:
    """Environment of an actor's process; must be set before vllm and torch are imported, so it goes into runtime_env.

    kernels: how many oneDNN keeps, on CPU.

    The reasons, as measured on vLLM 0.32 for CPUs: by default every engine binds to the same core (OMP_THREADS_BIND), and a
    compile in gather_logprobs costs seconds even with enforce_eager (TORCHDYNAMO_DISABLE). oneDNN keeps 1,024 kernels by default,
    one for each shape it meets: 400 MiB for a tiny policy, reached over thousands of groups. glibc keeps freed memory in an
    arena for every thread, and lets its limit for what goes back at once grow to 32 MiB: with both held, the coordinating
    parts stay at 260 MiB instead of 340 to 400 (scripts/bench/coordinator.py), and a worker keeps nothing of a publish.
    At 1 MiB the gaps that a tiny model's batches leave still grow over an hour (scripts/bench/soak.py): a judge from 385 to 396
    MiB, a learner rank from 510 to 521. At 512 KiB they hold 384 to 382 and 395 to 401, and such a run on CPU is 7 % slower;
    on GPUs neither is measured. A judge, whose pairs have all lengths, makes kernels all the time, and 32 of them keep gaps
    open: in a loop over a run's groups it is at 334 to 343 MiB, up and down, of which the same 150 of glibc's heap are in use
    throughout. With 8 of them it is at 333 to 335, and 2 % slower.
    """
    common = {
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # its own pools keep what they freed: see give_memory_back
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 19),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    }
    if gpus:
        return common
    return common | {
        "DS_ACCELERATOR": "cpu",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(kernels),
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def begin(run_dir: str, name: str) -> None:
    """To be called first by every actor: its output goes to its log, without secrets, its freed memory back to the system."""
    hide_in_logs()
    _redirect_output(run_dir, name)
    logger.info("%s: sppo-ray %s from %s", name, sppo_ray.__version__, Path(sppo_ray.__file__).parent)
    give_memory_back()


def give_memory_back(every_s: float = 10.0) -> None:
    """From now on what glibc holds of freed memory is given back at intervals; on another C library this does nothing.

    Batches have all lengths, and glibc keeps the gaps they leave: a tiny judge grew from 360 to 500 MiB in 2,400 groups, of
    which 340 were in use. Giving back takes some 12 ms.
    """
    library = ctypes.CDLL(None)

    def repeat() -> None:
        while True:
            time.sleep(every_s)
            library.malloc_trim(0)

    if hasattr(library, "malloc_trim"):
        threading.Thread(target=repeat, name="trim", daemon=True).start()


def _redirect_output(run_dir: str, name: str) -> None:
    """Send this process's stdout, stderr and logging to <run_dir>/logs/<name>.log; children inherit it. On a disk that takes no log
    it goes where Ray keeps its workers' output: that is no reason not to work."""
    path = Path(run_dir) / "logs" / f"{name}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, trouble = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), None
    except OSError as error:
        trouble = error
    else:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    sys.stdout, sys.stderr = HidingStream.of(1), HidingStream.of(2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True)
    if trouble:
        logger.warning("%s: its log cannot be opened (%s) and is here instead", name, trouble)


def assignment(role: Role, name: str) -> Assignment:
    """Where this process is and which GPUs Ray gave it."""
    return Assignment(role, name, ray.get_runtime_context().get_node_id(), tuple(str(gpu) for gpu in ray.get_gpu_ids()))
