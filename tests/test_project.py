"""The project itself: who imports whom, what is documented, and that README and examples run."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_sage
import snippets
from tasks import LIGHTNING_WARNINGS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_sage"
README = (ROOT / "README.md").read_text()

pytestmark = LIGHTNING_WARNINGS

# a file may import what its row names, and the standard library
MAY_IMPORT = {
    "ops/sight": {"torch"},
    "ops/reference/rows": {"torch"},
    "ops/reference/attention": {"torch", "ops/sight", "ops/reference/rows"},
    "ops/reference/__init__": {"ops/reference/attention", "ops/reference/rows"},
    "ops/stock": {"torch", "ops/reference", "ops/sight"},
    "ops/dropout": {"torch", "triton", "ops/reference"},
    "ops/tiles": {"torch", "triton", "ops/dropout"},
    "ops/rows": {"torch", "triton", "ops/dropout", "ops/reference", "ops/tiles"},
    "ops/attention": {"torch", "triton", "ops/reference", "ops/sight", "ops/tiles"},
    "ops/saliency": {"torch", "triton", "ops/reference", "ops/sight", "ops/tiles"},
    "ops/__init__": {
        "torch", "triton", "ops/reference", "ops/sight", "ops/stock", "ops/dropout", "ops/rows",
        "ops/attention", "ops/saliency",
    },
    "selections": {"torch"},
    "sampling": {"torch", "selections"},
    "policy": {"torch", "selections", "sampling"},
    "errors": set(),
    "memory_size": set(),
    "adapters": {"torch"},
    "buffers": {"torch"},
    "resume": {"torch"},
    "tokens": {"torch"},
    "balance": {"torch", "errors", "resume", "selections", "tokens"},
    "sharding": {"torch"},
    "records": {"torch"},
    "memory": {"torch"},
    "engine/__init__": set(),
    "engine/axes": {"torch", "errors", "ops"},
    "engine/streams": {"torch"},
    "engine/arguments": {"torch", "engine/axes", "errors", "ops", "engine/streams"},
    "engine/positions": {"torch", "ops"},
    "engine/torch_attention": {"torch"},
    "engine/flash": {"torch", "errors", "ops"},
    "engine/attention_call": {"torch", "engine/flash", "errors"},
    "engine/follow": {"torch", "errors"},
    "engine/intercept": {
        "torch", "engine/attention_call", "engine/flash", "engine/follow", "engine/positions",
        "engine/torch_attention",
    },
    "engine/drops": {
        "torch", "engine/attention_call", "engine/follow", "engine/positions", "errors", "ops",
    },
    "engine/packing": {"torch", "ops"},
    "engine/seen": {
        "torch", "engine/attention_call", "engine/follow", "engine/packing", "errors", "ops",
    },
    "engine/sparse": {"torch", "engine/attention_call", "engine/seen", "ops"},
    "engine/keys": {
        "torch", "engine/attention_call", "engine/drops", "engine/follow", "engine/seen", "errors",
        "ops",
    },
    "engine/replay": {
        "torch", "engine/attention_call", "engine/drops", "engine/flash", "engine/follow",
        "engine/keys", "engine/seen", "engine/sparse", "errors", "ops",
    },
    "engine/cache": {"torch", "engine/packing", "engine/seen", "ops"},
    "engine/facts": {"torch", "ops"},
    "engine/masks": {"torch", "engine/flash", "ops"},
    "engine/loss_rows": {"torch"},
    "engine/towers": {"torch"},
    "engine/saliency": {"torch", "engine/facts", "engine/seen"},
    "engine/requests": {"torch"},
    "engine/sides": {"torch", "errors"},
    "engine/chain": {"torch", "engine/drops"},
    "engine/choice": {"torch", "balance", "engine/drops", "ops", "selections"},
    "engine/session": {
        "torch", "balance", "engine/choice", "engine/drops", "engine/facts", "engine/flash",
        "engine/loss_rows", "engine/masks", "engine/replay", "engine/requests", "engine/saliency",
        "engine/seen", "engine/towers", "ops", "policy", "records", "selections",
    },
    "engine/modes": {"torch"},
    "engine/wrapped": {"torch", "engine/session", "errors"},
    "engine/job": {
        "torch", "balance", "buffers", "engine/arguments", "engine/chain", "engine/drops",
        "engine/intercept", "engine/modes", "engine/positions", "engine/replay", "engine/sides",
        "engine/wrapped", "errors", "ops", "records",
    },
    "engine/comparer": {
        "torch", "engine/attention_call", "engine/axes", "engine/follow", "engine/replay",
        "engine/seen", "engine/sparse", "errors", "ops",
    },
    "engine/dense_bytes": {"torch", "engine/job", "memory"},
    "engine/trial": {"torch", "ops"},
    "engine/graph": {"torch", "engine/job"},
    "engine/selfcheck": {
        "torch", "buffers", "engine/comparer", "engine/dense_bytes", "engine/drops",
        "engine/facts", "engine/graph", "engine/intercept", "engine/job", "engine/keys",
        "engine/replay", "engine/seen", "engine/sides", "engine/trial", "engine/wrapped", "errors",
        "ops",
    },
    "engine/thinning": {"torch", "engine/cache", "engine/job", "engine/session", "ops"},
    "engine/backward": {
        "torch", "balance", "engine/cache", "engine/job", "engine/keys", "engine/replay",
        "engine/session", "engine/thinning", "engine/wrapped", "errors", "ops", "selections",
    },
    "engine/block": {
        "torch", "engine/arguments", "engine/backward", "engine/cache", "engine/facts",
        "engine/job", "engine/packing", "engine/replay", "engine/seen", "engine/selfcheck",
        "engine/sides", "engine/wrapped", "errors", "ops", "records", "sharding",
    },
    "discovery": {"torch", "policy"},
    "install": {
        "torch", "adapters", "balance", "buffers", "discovery", "engine", "errors", "policy",
        "records", "sharding",
    },
    "block_metric": {"torch", "torchmetrics"},
    "fidelity": {"torch", "block_metric"},
    "metrics": {"torch", "block_metric", "fidelity", "memory"},
    "support": {"lightning"},
    "summary": {"rich"},
    "watch/__init__": set(),
    "watch/probe": {
        "torch", "torchmetrics", "buffers", "engine", "install", "policy", "records", "resume",
        "selections",
    },
    "watch/dial": {"policy", "records", "sampling", "selections"},
    "watch/memory_budget": {"torch", "memory_size", "policy", "sampling", "selections"},
    "watch/retry": {"torch", "lightning", "memory", "resume", "watch/probe"},
    "watch/monitor": {
        "torch", "lightning", "lightning_utilities", "install", "memory", "metrics", "policy",
        "records", "support", "watch/dial", "watch/memory_budget", "watch/probe",
    },
    "watch/steering": {
        "torch", "lightning", "install", "policy", "records", "watch/dial", "watch/memory_budget",
        "watch/monitor", "watch/retry",
    },
    "watch/meters": {"torch", "torchmetrics", "memory", "metrics", "records"},
    "watch/history": set(),
    "watch/reporter": {
        "torch", "lightning", "install", "policy", "records", "watch/dial", "watch/history",
        "watch/meters", "watch/monitor",
    },
    "watch/watch": {
        "torch", "lightning", "install", "memory", "policy", "watch/meters", "watch/monitor",
        "watch/reporter", "watch/steering",
    },
    "callback": {
        "torch", "lightning", "rich", "balance", "install", "policy", "resume", "selections",
        "summary", "support", "tokens", "watch",
    },
    "strategies": {
        "torch", "lightning", "balance", "callback", "discovery", "policy", "sharding", "support",
        "tokens",
    },
    "configured": {"callback", "policy", "strategies"},
    "cross_entropy": {"torch"},
    "models": {"torch", "lightning", "torchmetrics", "transformers", "peft", "cross_entropy"},
    "saving": {"torch", "lightning", "peft"},
    "loader": {"torch", "lightning"},
    "data": {"torch", "transformers", "datasets", "loader"},
    "corpus": {"torch", "data"},
    "report/__init__": set(),
    "report/block_names": set(),
    "report/thinning": {"watch"},
    "report/plots": {"matplotlib", "report/block_names"},
    "report/figures": {"memory", "watch", "report/plots", "report/thinning"},
    "report/token_view": {"report/block_names", "watch"},
    "report/page": {"memory", "report/figures", "watch", "report/thinning", "report/token_view"},
    "report/command": {"watch", "report/page"},
    "cli": {
        "lightning", "filelock", "jsonargparse", "rich", "corpus", "models", "saving", "selections",
    },
    "estimate/fakes": {"torch"},
    "estimate/ledger": {"torch"},
    "estimate/rehearsal": {
        "torch", "engine", "estimate/fakes", "estimate/ledger", "ops", "policy", "selections",
    },
    "estimate/footprint": {
        "torch", "discovery", "engine", "estimate/fakes", "estimate/ledger", "estimate/rehearsal",
        "policy",
    },
    "estimate/rehearsed_model": {"torch", "lightning", "engine", "estimate/fakes", "models"},
    "estimate/largest": set(),
    "estimate/prediction": {
        "torch", "errors", "estimate/fakes", "estimate/footprint", "estimate/largest",
        "estimate/rehearsed_model", "memory_size", "policy", "selections",
    },
    "estimate/__init__": {"estimate/prediction"},
    "estimate/command": {
        "torch", "lightning", "rich", "cli", "configured", "estimate/prediction",
    },
    "compare/__init__": set(),
    "compare/turns": set(),
    "compare/checkpointing": {"torch", "transformers", "discovery", "policy"},
    "compare/callbacks": {
        "torch", "lightning", "torchmetrics", "callback", "memory", "metrics", "policy", "tokens",
        "watch", "compare/checkpointing", "compare/turns",
    },
    "compare/contest": {
        "torch", "lightning", "callback", "cli", "configured", "models", "policy",
        "saving", "watch", "compare/callbacks", "compare/turns",
    },
    "compare/table": {"rich", "matplotlib"},
    "compare/command": {"rich", "policy", "compare/table", "compare/turns"},
    "commands": set(),
    "__main__": {"commands"},
}  # fmt: skip


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            # from a package one imports modules, from a module names
            if (PACKAGE.parent / node.module.replace(".", "/")).is_dir():
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def within(layer, parts):
    """What an import from the package counts as: a folder is one thing, but to its own files."""
    if not (PACKAGE / parts[0]).is_dir() or not layer.startswith(f"{parts[0]}/"):
        return parts[0]
    files = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(f for f in files if f in MAY_IMPORT or f"{f}/__init__" in MAY_IMPORT)


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        layer = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if layer == "__init__":
            continue
        for name in imported(path):
            head, *rest = name.split(".")
            target = within(layer, rest) if head == PACKAGE.name else head
            if target not in MAY_IMPORT[layer] | sys.stdlib_module_names:
                wrong.append(f"{layer} imports {target}")
    assert not wrong


def test_the_import_table_has_no_cycle_and_no_stale_row():
    files = {p.relative_to(PACKAGE).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py")}
    assert set(MAY_IMPORT) == files - {"__init__"}
    order = list(MAY_IMPORT)
    # a folder is there when the last of its files is
    packages = {parent.as_posix(): row for row in order for parent in Path(row).parents}
    for row, names in MAY_IMPORT.items():
        inside = {packages.get(n, n) for n in names if packages.get(n, n) in order}
        # a type of job is named in selfcheck, which job never imports
        assert all(order.index(n) < order.index(row) for n in inside), row


def test_every_file_says_its_reason_first():
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("examples/*.py")]:
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        assert first.endswith((".", ":", "?", "`.")), path.name


def test_public_names_are_documented():
    for name in vars(lightning_sage):
        item = getattr(lightning_sage, name)
        if name[0].isupper() or inspect.isfunction(item):
            assert inspect.getdoc(item), name
            assert item.__module__.startswith("lightning_sage."), name


def test_the_top_level_is_what_was_agreed():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert top == {
        "pyproject.toml", "lightning_sage", "configs", "tests", "examples", "README.md", "LICENSE",
    }  # fmt: skip


def test_code_stays_small():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        # a kernel is one function, and belongs beside its launcher
        most, longest = (400, 80) if "ops" in path.parts else (300, 60)
        assert source.count("\n") <= most, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.body[0].lineno + 1
                assert lines <= longest, f"{path.name}: {node.name} has {lines} lines"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed")
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_readme_snippets_run(number, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = compile(blocks("python")[number], f"README snippet {number}", "exec")
    exec(code, snippets.names())


def test_the_quickstart_example_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    source = (ROOT / "examples" / "quickstart.py").read_text()
    assert source.count("\n") <= 40
    exec(compile(source, "quickstart.py", "exec"), {"__name__": "__main__"})
    assert "tokens kept" in capsys.readouterr().out


def test_readme_is_short_and_shows_code_early():
    lines = README.split("\n")
    assert len(lines) <= 150
    assert next(i for i, line in enumerate(lines) if line.startswith("```python")) < 24


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README):
        assert (ROOT / target).exists(), target


def test_ci_runs_the_readme_command():
    match = re.search(r"<!-- tests -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert match
    assert "pytest" in match[1]
    assert "tests/constraints.txt" in match[1]
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()
