"""The images, built with Podman and run. Minutes and gigabytes, so only with SAPO_TEST_PODMAN=1, which `.ci/run` sets.

CI runs everything but the last test: all images are built, a small comparison runs in them, single stages hand each other
their artifacts through SeaweedFS, and each image is looked at. The last test runs the READMEs' lines with their full recipes,
which takes minutes more: SAPO_TEST_PODMAN=all.

Environment: what docker/podman.sh reads (BASE_IMAGE, TORCH_INDEX), and Podman's own CONTAINERS_CONF; podman_images.py finds out
what is not given.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from podman_images import ROOT, SKIP, STAGES, run

REGISTRY = "ghcr.io/sapo-pipelines"
LOCKED = ["--rm", "--read-only", "--tmpfs", "/tmp:rw,exec,mode=1777", "--cap-drop", "all", "--no-healthcheck"]
OPTIONAL = {"deepspeed", "vllm"}  # of the CUDA flavour
STEPS = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 3, "eval_rows": 8}
RUN = {
    "extends": "tiny",
    "data_settings": {"max_rows": 400},
    "sft_data_settings": {"max_rows": 400},
    "sft_settings": STEPS,
    "evaluation_settings": {"limit": 12},
    "methods": [{"name": "sapo-dpo", "stage": "sapo", "start": "sft", "recipe": "tiny-dpo", "settings": STEPS}],
}
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(SKIP), reason=SKIP)]


def run_comparison(engine: str, directory: Path, **changed: object) -> "subprocess.CompletedProcess[str]":
    run_file = directory / "run.yaml"
    run_file.write_text(yaml.safe_dump(RUN | changed))
    command = [sys.executable, "-m", "pipelines", "run", str(run_file), "--containers"]
    return run(*command, "--output", directory / "output", DOCKER_HOST=engine)


def reachable(path: Path) -> Path:
    """pytest's own directories are for the caller alone, and for root the stages run as another user."""
    for directory in (path, *path.parents):
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
            directory.chmod(0o755)
    return path


def test_a_comparison_runs_in_containers(engine: str, tmp_path: Path) -> None:
    done = run_comparison(engine, reachable(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(set(re.findall(r"^\[\d+/\d+\] (\S+):", done.stdout, re.M))) == 10
    outputs = tmp_path / "output" / "outputs"
    assert (outputs / "train-sapo-dpo" / "model" / "model.safetensors").stat().st_uid != 0 or os.getuid() != 0
    results = json.loads((outputs / "evaluate-sapo-dpo" / "results" / "results.json").read_text())
    assert results["name"] == "sapo-dpo"
    assert "sapo-dpo" in (outputs / "report" / "report" / "report.md").read_text()
    left = run("podman", "ps", "--all", "--quiet", "--filter", f"label=sapo-pipelines.run={tmp_path / 'output'}")
    assert left.stdout == ""


def test_a_failing_container_fails_the_run(engine: str, tmp_path: Path) -> None:
    done = run_comparison(engine, reachable(tmp_path), model_settings={"chat_template": "no-such"})
    assert done.returncode == 1
    assert re.search(r"task model \(.*\) failed with exit code 2; its log: ", done.stderr)
    assert not (tmp_path / "output" / "outputs" / "sft").exists()


def test_stages_hand_their_artifacts_over_in_a_store(images: None, chat_data: Path, tmp_path: Path) -> None:
    """`docker/try-stage.sh`, stage by stage: every input and output is in SeaweedFS."""
    rows = reachable(tmp_path) / "rows.jsonl"
    rows.write_bytes((chat_data / "train.jsonl").read_bytes())
    engine = {"ENGINE": "podman", "STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    engine["RUN_ARGS"] = f"--no-healthcheck --env OMP_NUM_THREADS --volume {rows}:/rows.jsonl:ro"

    def stage(line: str, *more: str) -> "subprocess.CompletedProcess[str]":
        return run(ROOT / "docker" / "try-stage.sh", *shlex.split(line), *more, **engine)

    steps = [f"--{name}={value}" for name, value in STEPS.items()]
    lines = {
        "data --source /rows.jsonl --test_rows 16 --output s3://sapo/data": [],
        "model --config tiny --data s3://sapo/data --output s3://sapo/model": [],
        "sft --config tiny --data s3://sapo/data --model s3://sapo/model --output s3://sapo/sft": steps,
        "sapo --config tiny-dpo --data s3://sapo/data --model s3://sapo/sft --output s3://sapo/sapo-dpo": steps,
        "evaluation --config held-out-tiny --data s3://sapo/data --model s3://sapo/sapo-dpo --output s3://sapo/scores": [],
        "report --evaluations '[s3://sapo/scores]' --trainings '[s3://sapo/sapo-dpo]' --output s3://sapo/report": [],
    }
    for line, more in lines.items():
        done = stage(line, *more)
        assert done.returncode == 0, line + done.stdout[-3000:] + done.stderr[-3000:]
    again = stage(line)
    assert (again.returncode, "already done: s3://sapo/report is the complete output" in again.stderr) == (0, True)
    broken = stage("model --config tiny --data s3://sapo/none --output s3://sapo/other")
    assert (broken.returncode, "s3://sapo/none" in broken.stderr) == (2, True)


def imported(stage: str) -> set[str]:
    """What the code of a stage imports from outside, wherever it does so."""
    names = set()
    for path in (ROOT / "components" / stage).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
    return names - sys.stdlib_module_names - OPTIONAL


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_holds_what_its_stages_import(images: None, stage: str) -> None:
    stages = ("sapo", "dpo", "orpo", "spin", "sft") if stage == "train" else (stage,)
    names = sorted(set().union(*map(imported, stages)))
    code = f"import importlib.util as u; print([n for n in {names} if not u.find_spec(n)])"
    inside = run("podman", "run", *LOCKED, "--entrypoint", "python3", f"{REGISTRY}/{stage}:0.1.0", "-c", code)
    assert inside.stdout == "[]\n", inside.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_helps_and_runs_as_no_root_on_a_read_only_root(images: None, stage: str) -> None:
    image = f"{REGISTRY}/{stage}:0.1.0"
    helped = run("podman", "run", *LOCKED, "--network", "none", image, "--help")
    assert (helped.returncode, stage in helped.stdout) == (0, True), helped.stderr
    code = "import os, shutil; print(os.getuid(), [os.access(p, os.W_OK) for p in ('/opt', '.', 'runs')], shutil.which('gcc'))"
    mounted = ["--network", "none", "--tmpfs", "/work/runs:rw,mode=1777", "--entrypoint", "python3"]
    inside = run("podman", "run", *LOCKED, *mounted, image, "-c", code)
    assert inside.stdout == "1000 [False, False, True] None\n", inside.stderr
    shape = json.loads(run("podman", "image", "inspect", image).stdout)[0]
    assert shape["User"] == "1000:1000"
    assert shape["Labels"]["org.opencontainers.image.title"] == stage
    assert shape["Healthcheck"]["Test"][0] == "CMD"


def test_evaluation_has_the_data_of_ifeval_and_mt_bench(images: None) -> None:
    code = (
        "from components.evaluation.config import EvaluationConfig\n"
        "from components.evaluation.lm_eval.ifeval_data import require_ifeval_data\n"
        "from components.evaluation.judged.mt_bench import load_data\n"
        "require_ifeval_data('/none')\n"
        "print(len(load_data(EvaluationConfig(model='m', output='o', benchmarks=['mt_bench'])).questions))\n"
    )
    image = f"{REGISTRY}/evaluation:0.1.0"
    inside = run("podman", "run", *LOCKED, "--network", "none", "--entrypoint", "python3", image, "-c", code)
    assert inside.stdout == "80\n", inside.stderr


def readme_lines() -> dict[str, str]:
    """Each component README's `docker run` line by output, in the order in which they can be run."""
    order = ("data", "model", "sft", "sapo", "dpo", "orpo", "spin", "evaluation", "report")
    found = {}
    for name in order:
        text = (ROOT / "components" / name / "README.md").read_text(encoding="utf-8")
        [line] = re.findall(r"^docker run .*$", text, re.M)
        found[line.rpartition(" ")[2]] = line
    return found


@pytest.mark.skipif(os.environ.get("SAPO_TEST_PODMAN") != "all", reason="minutes more: set SAPO_TEST_PODMAN=all")
def test_the_lines_of_the_readmes_run(images: None, tmp_path: Path) -> None:
    user = os.getuid() or 1000  # as root, too, the lines are run by another
    locked = " ".join(LOCKED)
    for name in ("PIP_CERT", "PIP_INDEX_URL"):  # the data come from PyPI
        if value := os.environ.get(name):
            locked += f" --env {name}" + (f" --volume {value}:{value}:ro" if value.startswith("/") else "")
    (tmp_path / "runs").mkdir()
    os.chown(tmp_path / "runs", user, -1)
    for output, line in readme_lines().items():
        command = line.replace("docker run --rm", f"podman run {locked}").replace("$(id -u)", str(user))
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, command + done.stdout[-3000:] + done.stderr[-3000:]
        assert (tmp_path / output).stat().st_uid == user
