"""The private names of kfp that are replaced: still there, still needed, and back in place afterwards."""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import kfp
import pytest
from kfp.compiler import pipeline_spec_builder
from kfp.dsl import pipeline_task
from kfp.local import (
    docker_task_handler,
    executor_input_utils,
    graph_utils,
    subprocess_task_handler,
    task_dispatcher,
)

from pipelines.local import kfp_patches
from pipelines.local.kfp_patches import applied, compiler_patches, container_patch, local_patches, process_patch

PIPELINES = Path(kfp_patches.__file__).parents[1]
Cli = Callable[..., tuple[int, str, str]]
# What is public of kfp: its packages, not the modules below them.
PUBLIC = {"kfp", "kfp.client", "kfp.compiler", "kfp.dsl", "kfp.kubernetes", "kfp.local"}
# Classes and constants that no package exports, used as they are.
READ = {
    ("kfp.dsl.constants", "WORKSPACE_MOUNT_PATH"),
    ("kfp.dsl.pipeline_config", "KubernetesWorkspaceConfig"),
}


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures_are_those_of_the_pinned_kfp() -> None:
    handler = subprocess_task_handler.SubprocessTaskHandler
    expected = ["self", "image", "full_command", "pipeline_root", "runner", "env_vars"]
    assert parameters(handler.__init__) == expected
    assert parameters(docker_task_handler.run_docker_container)[:3] == ["client", "image", "command"]
    assert "component_name" in parameters(task_dispatcher.run_single_task_implementation)
    assert "pipeline_resource_name" in parameters(task_dispatcher.run_single_task_implementation)
    assert parameters(executor_input_utils.get_local_pipeline_resource_name) == ["pipeline_name"]
    assert parameters(executor_input_utils.get_local_task_resource_name) == ["component_name"]
    assert parameters(graph_utils.topological_sort_tasks) == ["tasks"]
    assert parameters(pipeline_spec_builder.to_protobuf_value) == ["value"]
    source = inspect.getsource(pipeline_task)
    assert re.findall(r"inspect\.\w+\(\)\[\d\]\[\d\]", source) == ["inspect.stack()[1][3]"]


def test_what_is_patched_is_still_needed() -> None:
    handler = subprocess_task_handler.SubprocessTaskHandler
    runner = kfp.local.SubprocessRunner(use_venv=False)
    with pytest.raises(RuntimeError, match="Container Component"):
        handler(image="python", full_command=["true"], pipeline_root="", runner=runner)
    with pytest.raises(ValueError, match="NoneType"):
        pipeline_spec_builder.to_protobuf_value({"none": None})
    assert "auto_remove=True" in inspect.getsource(docker_task_handler.run_docker_container)
    assert "sys.executable" in inspect.getsource(subprocess_task_handler)


def test_patches_are_taken_out_again(fake_package: Path, tmp_path: Path, run_cli: Cli) -> None:
    patches = [
        *compiler_patches(),
        *local_patches(["a"], print),
        process_patch(lambda *_: 0),
        container_patch(lambda *_: 0),
    ]
    before = {(module, name): getattr(module, name) for module, name, _ in patches}
    with pytest.raises(ZeroDivisionError), applied(patches):
        assert {(module, name): getattr(module, name) for module, name, _ in patches} != before
        raise ZeroDivisionError
    run_cli("run", fake_package, "--set", "steps=1", "--output", tmp_path / "run")
    assert {key: getattr(*key) for key in before} == before


def test_no_other_file_of_the_pipelines_touches_what_kfp_keeps_to_itself() -> None:
    for path in PIPELINES.rglob("*.py"):
        if path.name == "kfp_patches.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {module for module in modules if module.split(".")[0] == "kfp"} <= PUBLIC, path
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kfp":
                names = {(node.module, alias.name) for alias in node.names}
                assert node.module in PUBLIC or names <= READ, f"{path}: {names}"


def test_every_patch_is_listed_with_its_issue() -> None:
    text = kfp_patches.__doc__ or ""
    rows = re.findall(r"^\| .*\| (.*) \| `(\w+)` \|$", text, re.M)
    made = {name for name, value in vars(kfp_patches).items() if inspect.isfunction(value)}
    helpers = {"applied", "compiler_patches", "local_patches", "run_package", "_without_retries"}
    assert {name for _, name in rows} == {name for name in made if value_is_ours(name)} - helpers
    assert all(re.fullmatch(r"none found|#\d+(, #\d+)*", issue) for issue, _ in rows)


def value_is_ours(name: str) -> bool:
    return getattr(kfp_patches, name).__module__ == kfp_patches.__name__
