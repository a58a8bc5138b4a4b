"""Nothing that is read is run: no call in the packages that executes data, or hands a text to a shell, or starts a Ray that
others reach."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "yaml.load": "yaml.safe_load, or a loader derived from yaml.SafeLoader",
    "yaml.load_all": "yaml.safe_load_all",
    "yaml.unsafe_load": "yaml.safe_load",
    "yaml.full_load": "yaml.safe_load",
    "pickle.load": "safetensors or JSON",
    "pickle.loads": "safetensors or JSON",
    "cloudpickle.load": "safetensors or JSON",
    "cloudpickle.loads": "safetensors or JSON",
    "joblib.load": "safetensors or JSON",
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle left alone",
    "eval": "a parser",
    "exec": "a function",
    "os.system": "subprocess with a list",
    "os.popen": "subprocess with a list",
}
# In whatever module or object they are looked for: they unpickle.
UNPICKLING = {
    "Unpickler", "read_pickle",
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list",
}  # fmt: skip
PICKLES = {"pickle", "cloudpickle", "joblib", "dill"}
# What carries the key of the ranks, and nothing else: tests/unit/test_ranks.py.
ALLOWED = {"actors/ranks.py": ["pickle.loads"]}


def unsafe_calls(source: str) -> Iterator[str]:
    """'line N: what, use instead' of every such call."""
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    safe_loaders = {node.name for node in classes if [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(node.func)
        name = ".".join(name.split(".")[-2:])  # ray.cloudpickle.loads, too
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        loader = given.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else None)
        allowed = (
            (name == "torch.load" and given.get("weights_only") == "True")
            or (name == "np.load" and given.get("allow_pickle", "False") == "False")
            or (name == "yaml.load" and loader in safe_loaders)
        )
        if name in FORBIDDEN and not allowed:
            yield f"line {node.lineno}: {name}; use {FORBIDDEN[name]}"
        if name.rpartition(".")[2] in UNPICKLING:
            yield f"line {node.lineno}: {name}; use actors.ranks.Ranks, safetensors or JSON"
        if given.get("shell", "False") != "False":
            yield f"line {node.lineno}: shell={given['shell']}; give subprocess a list"
        if given.get("trust_remote_code") == "True":
            yield f"line {node.lineno}: trust_remote_code=True; take it from the config"
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in PICKLES):
        yield f"line {node.lineno}: from {node.module}; import the module, so that its calls are seen"
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Import)):
        for given_name in (name for name in node.names if name.name in PICKLES and name.asname):
            yield f"line {node.lineno}: {given_name.name} as {given_name.asname}; leave its name"


@pytest.mark.parametrize("package", ["sppo_ray", "actors", "scripts"])
def test_no_unsafe_call(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    calls = {str(path.relative_to(ROOT)): list(unsafe_calls(path.read_text())) for path in files}
    for name, allowed in ALLOWED.items():
        if name in calls:
            assert [call.split(": ")[1].split(";")[0] for call in calls.pop(name)] == allowed
    found = [f"{name}, {call}" for name, unsafe in calls.items() for call in unsafe]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, map_location='cpu', weights_only=True)", False),
        ("yaml.load(text, Loader=yaml.Loader)", True),
        ("class L(yaml.Loader): pass\nyaml.load(text, L)", True),
        ("class L(yaml.SafeLoader): pass\nyaml.load(text, L)", False),
        ("yaml.safe_load(text)", False),
        ("pickle.loads(data)", True),
        ("ray.cloudpickle.loads(data)", True),
        ("pd.read_pickle(path)", True),
        ("pickle.dumps(data)", False),
        ("pickle.Unpickler(file).load()", True),
        ("from pickle import loads", True),
        ("import pickle as p", True),
        ("dist.all_gather_object(found, mine)", True),
        ("dist.all_gather(found, mine)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path)", False),
        ("eval(text)", True),
        ("model.eval()", False),
        ("subprocess.run(command, shell=True)", True),
        ("subprocess.run(command)", False),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", True),
        ("AutoModel.from_pretrained(path, trust_remote_code=config.policy.trust_remote_code)", False),
    ],
)
def test_what_counts_as_unsafe(source: str, unsafe: bool) -> None:
    assert bool(list(unsafe_calls(source))) == unsafe


def starts_a_ray(source: str) -> bool:
    """Whether it calls ray.init with anything but a variable for an address."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    inits = [call for call in calls if ast.unparse(call.func) == "ray.init"]
    given = [[*call.args[:1], *(key.value for key in call.keywords if key.arg == "address")] for call in inits]
    return not all(addresses and isinstance(addresses[0], ast.Name) for addresses in given)


@pytest.mark.parametrize(
    ("source", "starts"),
    [
        ("ray.init()", True),
        ("ray.init('local')", True),
        ("ray.init(num_cpus=2, address='local')", True),
        ("ray.init(address, num_cpus=2)", False),
        ("ray.init(address=address)", False),
        ("ray.get(ref)", False),
    ],
)
def test_what_counts_as_starting_a_ray(source: str, starts: bool) -> None:
    assert starts_a_ray(source) == starts


def test_whatever_starts_a_ray_here_keeps_it_on_loopback() -> None:
    files = [path for folder in ("actors", "scripts") for path in (ROOT / folder).rglob("*.py")]
    starting = [path for path in files if starts_a_ray(path.read_text())]
    assert {path.name for path in starting} == {"cluster.py", "publish.py"}
    assert all("    stay_on_loopback()\n" in path.read_text() for path in starting)
