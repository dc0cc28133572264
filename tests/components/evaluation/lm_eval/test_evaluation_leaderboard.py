"""The seven lm-eval benchmarks: their shots, metrics and data, and runs on small copies of their data sets."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from leaderboard_data import folder_of, gsm8k, write, write_all
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from components.common.core.errors import UserError
from components.common.models.loading import load_tokenizer
from components.common.storage.locations import package_directory
from components.evaluation.__main__ import main
from components.evaluation.config import EvaluationConfig
from components.evaluation.lm_eval import benchmark as leaderboard
from components.evaluation.lm_eval import ifeval_data
from components.evaluation.lm_eval.loading import load_tasks, stop_at
from components.evaluation.registry import BENCHMARKS, GROUPS, HEADLINES

ALL = (*GROUPS["leaderboard"], "ifeval")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("task_data"))


@pytest.fixture(scope="module")
def model(chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a window that fits 25 examples, and heads of 32, the least that vLLM has on a CPU."""
    from components.model.__main__ import main as make_model

    directory = tmp_path_factory.mktemp("model")
    (directory / "wide.yaml").write_text(
        "model: {model_type: llama, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2,\n"
        "        num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 4096}\n"
        "tokenizer: {vocab_size: 400}\n"
    )
    source = f"scratch://{directory / 'wide.yaml'}"
    make_model(["--source", source, "--data", str(chat_data), "--output", str(directory / "wide")])
    return directory / "wide"


@pytest.fixture(scope="module")
def punkt() -> str:
    """The sentence splitter, from the package that carries it."""
    try:
        package_directory("pypi://llama-index-core")
    except UserError as error:
        pytest.skip(str(error))
    return "pypi://llama-index-core"


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What lm-eval gives, prompts included, for each benchmark that the test runs."""
    seen: list[dict[str, Any]] = []
    evaluate = leaderboard.evaluate
    monkeypatch.setattr(leaderboard, "evaluate", lambda *a, **k: seen.append(evaluate(*a, **k)) or seen[-1])
    return seen


def config(model: Path, task_data: Path, **more: Any) -> EvaluationConfig:
    return EvaluationConfig(model=str(model), output="o", task_data=str(task_data), **more)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_shots_and_splits_are_those_of_lm_evals_openllm_group():
    listed = {
        entry["task"]: entry for entry in yaml.safe_load(folder_of("benchmarks/openllm.yaml").read_text())["task"]
    }
    listed["truthfulqa_mc2"] = listed.pop("truthfulqa")
    assert set(listed) == set(GROUPS["leaderboard"])
    for name, entry in listed.items():
        assert leaderboard.TASKS[name].shots == entry["num_fewshot"]
        assert leaderboard.TASKS[name].fewshot_split == entry.get("fewshot_split")
    assert leaderboard.TASKS["ifeval"].shots == 0


@pytest.mark.parametrize("name", ALL)
def test_names_metrics_and_data_are_those_of_lm_evals_tasks(name: str):
    benchmark = leaderboard.TASKS[name]
    index = TaskManager(include_defaults=False, include_path=[folder_of(benchmark.folder)]).task_index
    assert name in index
    tasks = [entry.cfg for task, entry in index.items() if entry.cfg and (task == name or task.startswith("mmlu_"))]
    tasks = [task for task in tasks if "dataset_path" in task]
    assert len(tasks) == (57 if name == "mmlu" else 1)
    for task in tasks:
        assert task["dataset_path"] == benchmark.dataset
        filters = [entry["name"] for entry in task.get("filter_list", [{"name": "none"}])]
        metrics = [entry["metric"] for entry in task["metric_list"]]
        for wanted in benchmark.metrics.values():
            assert wanted.split(",")[0] in metrics
            assert wanted.split(",")[1] in filters
    if name in HEADLINES:
        assert next(iter(benchmark.metrics)) == HEADLINES[name]


@pytest.mark.parametrize(("name", "tokens"), [("gsm8k", 256), ("ifeval", 1280)])
def test_answers_have_the_tokens_of_lm_evals_task_or_its_default(
    name: str, tokens: int, model: Path, task_data: Path, punkt: str
):
    settings = config(model, task_data, nltk_data=punkt)
    loaded = load_tasks(name, settings)["tasks"]
    assert loaded[name].config.generation_kwargs.get("max_gen_toks", HFLM.max_gen_toks.fget(None)) == tokens
    assert stop_at(loaded, [], load_tokenizer(str(model)), 4096)["max_new_tokens"] == tokens


def test_every_task_is_a_benchmark_and_the_other_way_round():
    module = leaderboard.__name__
    assert set(leaderboard.TASKS) == {name for name, entry in BENCHMARKS.items() if entry.module == module}


EXAMPLES = {  # what opens an example, and how often it stands in a prompt
    "arc_challenge": ("Question: Which city", 26),
    "hellaswag": ("Travelling: A woman", 11),
    "mmlu": ("What is", 6),
    "truthfulqa_mc2": ("Q: ", 7),  # six in the task's own text
    "winogrande": ("took the bus", 6),
    "gsm8k": ("Question: Tom", 6),
    "ifeval": ("Write ", 1),
}


@pytest.mark.slow
def test_all_seven_run_on_copies_of_their_data(
    model: Path, task_data: Path, punkt: str, tmp_path: Path, outcomes: list[dict[str, Any]]
):
    output = tmp_path / "o"
    flags = ["--model", str(model), "--task_data", str(task_data), "--nltk_data", punkt, "--output", str(output)]
    main([*flags, "--benchmarks", "[leaderboard, ifeval]", "--limit", "2"])
    found = read(output / "results.json")
    entries = {(entry["benchmark"], entry["metric"]): entry for entry in found["results"]}
    for name, outcome in zip(ALL, outcomes, strict=True):
        prompt = next(iter(outcome["samples"].values()))[0]["arguments"][0][0]
        text, times = EXAMPLES[name]
        assert prompt.count(text) == times, name
        assert ("<|im_start|>" in prompt) == (name == "ifeval")
        record = found["benchmarks"][name]
        assert record["seconds"] > 0
        assert record["details"]["chat_template"] == (name == "ifeval")
        assert record["details"]["task_versions"][name] == outcome["versions"][name]
        assert (output / name / "samples.jsonl").is_file()
    assert [entries[key]["n"] for key in HEADLINES.items()] == [2, 2, 114, 2, 2, 2]
    average = entries["leaderboard", "average"]
    assert average["value"] == pytest.approx(sum(entries[key]["value"] for key in HEADLINES.items()) / 6)
    errors = [entries[key]["stderr"] for key in HEADLINES.items()]
    assert average["stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 6)
    assert {"lm_eval", "torch", "transformers", "datasets", "nltk", "langdetect"} <= set(found["versions"])


def test_acc_norm_is_the_likeliest_choice_per_character(
    model: Path, task_data: Path, tmp_path: Path, outcomes: list[dict[str, Any]]
):
    output = tmp_path / "o"
    flags = ["--model", str(model), "--task_data", str(task_data), "--output", str(output)]
    main([*flags, "--benchmarks", "[arc_challenge]"])
    (outcome,), (entry,) = outcomes, read(output / "results.json")["results"]
    right = 0
    for sample in outcome["samples"]["arc_challenge"]:
        choices = sample["doc"]["choices"]["text"]
        per_character = [ll / len(choice) for (ll, _), choice in zip(sample["filtered_resps"], choices, strict=True)]
        right += per_character.index(max(per_character)) == "ABCD".index(sample["doc"]["answerKey"])
    assert entry["value"] == right / 4
    details = read(output / "results.json")["benchmarks"]["arc_challenge"]["details"]
    prompt = outcome["samples"]["arc_challenge"][0]["arguments"][0][0]
    tokenizer = load_tokenizer(str(model))
    ids = tokenizer(prompt)["input_ids"]
    assert details["tokens"]["first_prompt_ids"] == ids[:16]
    assert details["tokens"]["first_prompt_length"] == len(ids)
    assert details["tokens"]["starts_with_bos"] == (ids[0] == tokenizer.bos_token_id)


@pytest.mark.slow
def test_examples_become_turns_with_the_chat_template(
    model: Path, task_data: Path, tmp_path: Path, outcomes: list[dict[str, Any]]
):
    flags = ["--model", str(model), "--task_data", str(task_data), "--benchmarks", "[gsm8k]", "--limit", "1"]
    main([*flags, "--apply_chat_template", "--output", str(tmp_path / "turns")])
    main([*flags, "--apply_chat_template", "--fewshot_as_multiturn", "false", "--output", str(tmp_path / "one")])
    turns, one = (outcome["samples"]["gsm8k"][0]["arguments"][0][0] for outcome in outcomes)
    assert turns.count("<|im_start|>user") == 6 and turns.count("<|im_start|>assistant") == 6
    assert one.count("<|im_start|>user") == 1 and one.count("Question: Tom") == 6
    details = read(tmp_path / "turns/results.json")["benchmarks"]["gsm8k"]["details"]
    assert details["chat_template"] and details["fewshot_as_multiturn"]
    assert details["stops"] == ["Question:", "</s>", "<|im_end|>"]
    assert load_tokenizer(str(model)).eos_token_id in details["stop_ids"]
    assert details["max_new_tokens"] == 256


class Oracle(LM):
    """Gives answers that the test wrote."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [next(a for q, a in self.answers.items() if r.args[0].endswith(q)) for r in requests]

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def scored(name: str, settings: EvaluationConfig, answers: dict[str, str]) -> dict[str, dict[str, Any]]:
    tasks = leaderboard.load_tasks(name, settings)
    outcome = leaderboard._evaluate(Oracle(answers), tasks, settings, chat=False)
    task = leaderboard.TASKS[name]
    return {entry["metric"]: dict(entry) for entry in task.read(name, task.metrics, "", outcome)}


def test_gsm8k_by_hand(model: Path, task_data: Path):
    written = ["so #### 1,000", "that makes $1,001.", "#### 7", "#### 1003"]
    answers = {f"{i} coins and gets 1,000. How many?\nAnswer:": text for i, text in enumerate(written)}
    entries = scored("gsm8k", config(model, task_data), answers)
    assert entries["exact_match"]["value"] == 2 / 4
    assert entries["exact_match"]["stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert entries["exact_match_flexible"]["value"] == 3 / 4
    assert entries["exact_match"]["n"] == 4


def test_ifeval_by_hand(model: Path, task_data: Path, punkt: str):
    answers = {
        "'river' in it.": "A river runs. It is long",  # both followed
        "3 sentences.": "*Well*\nDr. Smith came. He left.",  # two sentences, however one trims it
        "quotation marks.": 'Voici:\n"Le temps est beau et je suis content de vous voir ici aujourd\'hui."',
    }
    entries = scored("ifeval", config(model, task_data, nltk_data=punkt), answers)
    values = {metric: entry["value"] for metric, entry in entries.items()}
    assert values == {
        "average": pytest.approx((1 / 3 + 3 / 5 + 2 / 3 + 4 / 5) / 4),
        "prompt_level_strict_acc": pytest.approx(1 / 3),
        "inst_level_strict_acc": pytest.approx(3 / 5),  # French, but not all of it in quotation marks
        "prompt_level_loose_acc": pytest.approx(2 / 3),  # without its first line it is
        "inst_level_loose_acc": pytest.approx(4 / 5),
    }
    assert [entry["n"] for entry in entries.values()] == [3, 3, 5, 3, 5]
    # Over prompts, of a mean: sqrt(p (1 - p) / (n - 1)); of instructions: residuals 2 - 6/5, 0 - 3/5, 1 - 6/5 over 5.
    assert entries["prompt_level_strict_acc"]["stderr"] == pytest.approx(math.sqrt(2 / 9 / 2))
    residuals = [2 - 6 / 5, -3 / 5, 1 - 6 / 5]
    expected = math.sqrt(3 / 2 * sum(r**2 for r in residuals)) / 5
    assert entries["inst_level_strict_acc"]["stderr"] == pytest.approx(expected)
    assert 0 < entries["average"]["stderr"] < 0.4


def test_a_yaml_of_task_path_replaces_the_packages(model: Path, task_data: Path, tmp_path: Path):
    own = tmp_path / "tasks"
    own.mkdir()
    data = tmp_path / "two.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in gsm8k(6)))
    (own / "gsm8k.yaml").write_text(
        f"include: {folder_of('gsm8k/gsm8k.yaml')}\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}\n"
    )
    settings = EvaluationConfig(model=str(model), output="o", task_path=str(own))
    assert leaderboard.check("gsm8k", settings) == "6 documents, 5 shots, with hf"


@pytest.mark.slow
def test_a_finished_benchmark_is_kept_on_resume(model: Path, task_data: Path, tmp_path: Path):
    flags = ["--model", str(model), "--task_data", str(task_data), "--output", str(tmp_path / "o"), "--limit", "1"]
    main([*flags, "--benchmarks", "[winogrande]"])
    first = read(tmp_path / "o/winogrande/outcome.json")
    (tmp_path / "o/winogrande/outcome.json").write_text(json.dumps({**first, "seconds": 1234.5}))
    with pytest.raises(UserError, match=r"is not empty; give another directory, or --overwrite"):
        main([*flags, "--benchmarks", "[winogrande, truthfulqa_mc2]"])
    with pytest.raises(UserError, match=r"is of another run: limit was 1, is 2; give the settings .* --overwrite"):
        main([*flags, "--limit", "2", "--resume"])
    main([*flags, "--benchmarks", "[winogrande, truthfulqa_mc2]", "--resume"])
    found = read(tmp_path / "o/results.json")
    assert found["benchmarks"]["winogrande"]["seconds"] == 1234.5
    assert [entry["benchmark"] for entry in found["results"]] == ["winogrande", "truthfulqa_mc2"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights may be loaded before the mistake is told."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("components.common.models.loading.load_model", refuse)


@pytest.mark.usefixtures("no_model")
class TestMistakes:
    """One line before any weights are loaded."""

    def told(self, model: Path, tmp_path: Path, *flags: str) -> str:
        with pytest.raises(UserError) as error:
            main(["--model", str(model), "--output", str(tmp_path / "o"), *flags])
        assert not (tmp_path / "o").exists()
        return str(error.value)

    def test_a_missing_copy(self, model: Path, tmp_path: Path):
        said = self.told(model, tmp_path, "--benchmarks", "[gsm8k]", "--task_data", str(tmp_path))
        assert f"--task_data {tmp_path}: has no openai/gsm8k; " in said
        assert f"hf download openai/gsm8k --repo-type dataset --local-dir {tmp_path}/openai/gsm8k" in said

    def test_an_empty_file_and_too_few_examples(self, model: Path, tmp_path: Path):
        write(tmp_path / "openai/gsm8k", {"main": {"train": gsm8k(5), "test": []}})
        said = self.told(model, tmp_path, "--benchmarks", "[gsm8k]", "--task_data", str(tmp_path))
        assert said.startswith(f"gsm8k: its data ({tmp_path}/openai/gsm8k) cannot be loaded: ")
        write(tmp_path / "openai/gsm8k", {"main": {"train": gsm8k(4), "test": gsm8k(2)}})
        said = self.told(model, tmp_path, "--benchmarks", "[gsm8k]", "--task_data", str(tmp_path))
        assert said == "gsm8k: needs 5 examples and its data has 4"

    def test_no_chat_template(self, model: Path, task_data: Path, tmp_path: Path):
        bare = shutil.copytree(model, tmp_path / "bare")
        (bare / "chat_template.jinja").unlink()
        said = self.told(bare, tmp_path, "--benchmarks", "[gsm8k]", "--task_data", str(task_data))
        assert "its tokenizer has no chat template; run the model stage" in said

    def test_no_sentence_splitter(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("nltk.data.path", [])
        said = self.told(model, tmp_path, "--benchmarks", "[ifeval]", "--nltk_data", str(tmp_path))
        assert f"--nltk_data {tmp_path}: NLTK finds no tokenizers/punkt_tab/english in {tmp_path}; give" in said
        said = self.told(model, tmp_path, "--benchmarks", "[ifeval]", "--nltk_data", "/none")
        assert "IFEval needs NLTK's punkt_tab, which is not installed: --nltk_data /none: no such file" in said
        assert "--nltk_data pypi://llama-index-core" in said

    def test_no_packages_of_the_verifiers(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(ifeval_data.importlib.util, "find_spec", lambda name: None)
        said = self.told(model, tmp_path, "--benchmarks", "[ifeval]")
        assert said == "IFEval needs nltk, langdetect, immutabledict: pip install 'lm-eval[ifeval]'"


@pytest.mark.slow
def test_vllm_scores_as_transformers_do(model: Path, task_data: Path, tmp_path: Path, outcomes: list[dict[str, Any]]):
    pytest.importorskip("vllm")
    flags = ["--model", str(model), "--task_data", str(task_data), "--benchmarks", "[arc_challenge, gsm8k]"]
    for engine in ("hf", "vllm"):
        main([*flags, "--limit", "2", "--engine", engine, "--output", str(tmp_path / engine)])
    scores = [[s["filtered_resps"] for s in outcome["samples"]["arc_challenge"]] for outcome in outcomes[::2]]
    for theirs, ours in zip(*scores, strict=True):
        assert [ll for ll, _ in ours] == pytest.approx([ll for ll, _ in theirs], abs=1e-3)
    answers = [[s["resps"] for s in outcome["samples"]["gsm8k"]] for outcome in outcomes[1::2]]
    assert answers[0] == answers[1]
    found = read(tmp_path / "vllm/results.json")
    assert "vllm" in found["versions"] and found["benchmarks"]["gsm8k"]["details"]["engine"] == "vllm"
