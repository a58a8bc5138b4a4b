"""The command line: `sppo train | plan | eval | scale`. Exit codes: 0 done, 2 refused input, 1 failed (run again to resume)."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sppo_ray import __version__
from sppo_ray.config import Config
from sppo_ray.config_io import dump_config, load_config
from sppo_ray.errors import ConfigError, SppoError
from sppo_ray.given import user_path
from sppo_ray.progress import say
from sppo_ray.secrets import hide_in_logs

app = typer.Typer(
    name="sppo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Self-Play Preference Optimization on Ray: vLLM rollouts, PairRM judging, DeepSpeed learner.",
)
out, err = Console(), Console(stderr=True, soft_wrap=True)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML config; the shipped ones are in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, e.g. rollout.num_workers=2 data.limit=64."),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Console script. Ends the process with the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` sends it: the same as Ctrl-C
    app(args=None if arguments is None else list(arguments))


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML config; the shipped ones are in configs/.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in run.dir; without --config by the config that it holds."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show what would run, start nothing.")
    ] = False,
) -> None:
    """Run self-play preference optimization. The same command on the same run.dir goes on where the run stopped; so does
    `--resume run.dir=DIR`, which needs nothing but that directory, and refuses one that holds no run. Where models and prompts lie
    elsewhere, on another machine, say, name them again: policy.model=..., judge.model=..., data.prompts=..."""
    with exit_codes():
        _train(_config_of(config, resume, overrides or ()), dry_run)


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show layout, steps, tokens and memory per GPU and phase. Needs no GPU and no download; exits 2 if it does not fit."""
    from sppo_ray.plan import make_plan, refuse_unfit, render_plan

    with exit_codes():
        made = make_plan(load_config(config, overrides or ()))
        out.print(render_plan(made))
        refuse_unfit(made)


@app.command(name="eval")
def evaluate(
    config: ConfigFile,
    policy: Annotated[str, typer.Option("--policy", help="Folder or hub name of the policy to evaluate.")],
    overrides: Overrides = None,
) -> None:
    """Compare a policy with policy.model of the config on the held-out prompts, by the judge (and the oracle, if there is one)."""
    with exit_codes():
        from actors.evaluate import evaluate as run_evaluation
        from sppo_ray.layout import compute_layout
        from sppo_ray.model_folder import NotAPolicy, inspect_policy
        from sppo_ray.preflight import preflight

        resolved = load_config(config, overrides or ())
        if resolved.evaluation.prompts is None:
            raise ConfigError("evaluation.prompts=null leaves nothing to evaluate on; name held-out prompts.")
        try:
            inspect_policy(policy, resolved.policy.trust_remote_code)
        except NotAPolicy as error:  # policy.model is the other one here
            raise ConfigError(str(error).replace("policy.model", "--policy")) from None
        layout = compute_layout(resolved)
        out.print(run_evaluation(resolved, layout, preflight(resolved), policy, out))


@app.command()
def scale(
    run: Annotated[Path, typer.Option("--run", help="Run directory of a running async job.")],
    changes: Annotated[
        list[str], typer.Argument(metavar="ROLE=COUNT...", help="E.g. rollout=4, rollout=+2, judge=-1.")
    ],
) -> None:
    """Add or remove rollout and judge workers while an async run goes on. When it is resumed its config's counts hold again."""
    from sppo_ray.scaling import request

    with exit_codes():
        before, now = request(user_path(run).resolve(), changes)
        say(
            out,
            f"asked for {now.rollout} rollout and {now.judge} judge workers (before: {before.rollout} and {before.judge}); "
            "the run follows within seconds, and a newcomer works as soon as it serves the current weights",
        )


def _config_of(config: Path | None, resume: bool, overrides: Sequence[str]) -> Config:
    """Of a new run, or of one that goes on, whose own config is taken if no other is given to compare it with."""
    from sppo_ray.run_dir import own_config

    if config is None:
        named = [text.removeprefix("run.dir=") for text in overrides if text.startswith("run.dir=")]
        if not resume or not named:
            raise ConfigError("no config is given: name one with --config FILE, or a run by --resume run.dir=DIR.")
        config = user_path(Path(named[-1]) / "config.yaml")
        if not config.exists():
            raise ConfigError(
                f"--resume run.dir={named[-1]}: there is no config.yaml in it, so no run was begun there. Name a run's own "
                "directory, or begin one with --config FILE."
            )
        own_config(config.parent)  # if it is damaged, says what to do
    resolved = load_config(config, overrides)
    if resume and not user_path(Path(resolved.run.dir) / "config.yaml").exists():
        raise ConfigError(f"--resume: run.dir={resolved.run.dir} holds no run; leave --resume out to begin one there.")
    return resolved


def _train(config: Config, dry_run: bool) -> None:
    from sppo_ray.layout import compute_layout
    from sppo_ray.mirror import Mirror, check_mirror
    from sppo_ray.preflight import preflight
    from sppo_ray.run_dir import check_run_dir, read_manifest

    check_run_dir(config)
    check_mirror(config)
    layout = compute_layout(config)
    _refuse_unfit(config)
    checked = preflight(config)
    _refuse_unfit(config)  # again: a hub model's config.json is here now
    say(out, f"prompts: {checked.prompts.report.summary()}")
    for warning in checked.warnings:
        say(err, f"note: {warning}", "yellow")
    if dry_run:
        from sppo_ray.plan import make_plan, render_plan

        out.print(render_plan(make_plan(config, [len(part) for part in checked.prompts.slices])))
        out.print(dump_config(config), highlight=False, markup=False)
        return
    root = Path(config.run.dir)
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and root.is_relative_to(Path.cwd()):
        say(err, f"note: run.dir={root} lies in Ray's copy of the working directory; an absolute path outlives the job")
    if read_manifest(root).get("status") == "done":
        say(out, f"{root} is complete; here is its result. To run again, name another run.dir.")
        if config.run.mirror:  # the run's own end may not have waited for all of it
            asyncio.run(Mirror(config, partial(say, out), partial(say, err, style="yellow")).finish())
        _show_result(root)
        return
    from actors.train import train as run_training

    begun = time.monotonic()
    run_training(config, layout, checked, out)
    minutes, seconds = divmod(round(time.monotonic() - begun), 60)
    out.print(f"this took {minutes} min {seconds} s", highlight=False)
    _show_result(root)


def _refuse_unfit(config: Config) -> None:
    """Refuse what `plan` would refuse, on GPUs. A model whose shape is unknown passes: there is nothing to add up."""
    from sppo_ray.model_shapes import model_shape
    from sppo_ray.plan import make_plan, refuse_unfit

    if config.cluster.gpus == 0:
        return
    try:
        for model in (config.policy.model, config.judge.model):
            model_shape(model)
    except ConfigError:  # of a hub name not yet seen, or another family; what is wrong with a folder, preflight says
        return
    refuse_unfit(make_plan(config, prompts=0))


def _show_result(root: Path) -> None:
    from sppo_ray.metrics import read_metrics
    from sppo_ray.summary import closing_table

    if table := closing_table(read_metrics(root / "metrics.jsonl")):
        out.print(table)
    say(out, f"run directory: {root}")


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors as a paragraph on stderr and an exit code; a traceback only for what this project did not foresee."""
    hide_in_logs()
    try:
        yield
    except ConfigError as error:
        _refuse(str(error))
    except (KeyboardInterrupt, asyncio.CancelledError):  # Ctrl-C; SIGTERM, by which `ray job stop` ends a run
        err.print("interrupted; the same command goes on where the run stopped", style="yellow")
        raise typer.Exit(1) from None
    except SppoError as error:
        say(err, f"failed: {error}", "red")
        for note in getattr(error, "__notes__", ()):
            say(err, note)
        err.print("the same command can be given again; a run that has begun goes on where it stopped", style="yellow")
        raise typer.Exit(1) from None


def _refuse(message: str) -> None:
    say(err, f"refused: {message}", "red")
    raise typer.Exit(2) from None
