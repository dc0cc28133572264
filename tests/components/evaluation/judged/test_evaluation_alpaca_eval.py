"""AlpacaEval from the prompts to the win rates, with the micro model answering and a judge over HTTP."""

import csv
import json
import logging
import math
import statistics
from pathlib import Path

import pytest
from judge_server import KEY, JudgeServer, serving

from components.common.core.errors import UserError
from components.evaluation.config import EvaluationConfig
from components.evaluation.context import Context
from components.evaluation.judged import alpaca_eval
from components.evaluation.judged.alpaca_eval import OPTIONS
from components.evaluation.judged.generation import Answer
from components.evaluation.judged.judge import Judge

COUNT = 14
TEMPLATE = "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of the hub data set's format: references, and gamed annotations with the difficulty of each prompt."""
    folder = tmp_path / "data"
    folder.mkdir()
    references = [
        {
            "dataset": "helpful_base",
            "instruction": f"What about the cat, {i}?",
            "output": f"Reference {i}. " + "It sleeps. " * (i % 5),
            "generator": "gpt4_1106_preview",
        }
        for i in range(COUNT)
    ]
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(references))
    with (folder / "df_gamed.csv").open("w", newline="") as file:
        names = ("model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
        rows = csv.DictWriter(file, names)
        rows.writeheader()
        for model, better in (("concise", 0.35), ("verbose", 0.65)):
            for i in range(COUNT):
                difficulty = math.sin(i)
                length = (1 if model == "concise" else -1) * (1 + i % 3)
                values = (model, i, better + 0.1 * difficulty, length, difficulty, False)
                rows.writerow(dict(zip(names, values, strict=True)))
    return folder


@pytest.fixture
def configure(micro_model: Path, data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def make(url: str = "http://127.0.0.1:1/v1", **changed) -> EvaluationConfig:
        settings = {
            "output": str(tmp_path / "out"),
            "model": str(micro_model),
            "benchmarks": ("alpaca_eval",),
            "limit": COUNT,
            "alpaca_eval_data": str(data),
            "alpaca_eval_max_new_tokens": 12,
            "judge_base_url": url,
            "judge_retries": 0,
            "judge_concurrency": 2,
        }
        return EvaluationConfig(**(settings | changed))

    return make


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return make_context(tmp_path / "out")


def make_context(folder: Path) -> Context:
    folder.mkdir(parents=True)
    return Context(name="micro", folder=folder, device="cpu", dtype="float32")


def number(body: dict) -> int:
    """Which prompt a request is about; -1 for the probe of `check`."""
    text = body["messages"][-1]["content"]
    return int(text.partition("What about the cat, ")[2].partition("?")[0] or -1)


def verdict(body: dict) -> dict[str, float]:
    """Log-probabilities of m and M among other tokens; of prompt 5 neither, ever, and of prompt 6 not M."""
    i = number(body)
    if i == 5:
        return {"The": -0.1, "A": -3.0}
    likely = 0.05 + 0.9 * ((i * 5) % COUNT) / COUNT
    return {"M": math.log(1 - likely), "m": math.log(likely), "The": -9.0} if i != 6 else {"m": -0.2, "The": -4.0}


def model_is_first(body: dict) -> bool:
    """Whether the prompt shows the model's answer before the reference."""
    before, marker, _ = body["messages"][-1]["content"].partition('"M"')
    assert marker
    return f"Reference {number(body)}." not in before


def test_the_win_rate_is_that_of_the_recorded_judgements(configure, context):
    level = logging.getLogger().level
    with serving(JudgeServer(verdict)) as served:
        config = configure(served.url)
        checked = alpaca_eval.check("alpaca_eval", config)
        assert checked == "14 prompts, compared with gpt4_1106_preview by gpt-4-1106-preview"
        outcome = alpaca_eval.run("alpaca_eval", config, context)
    assert logging.getLogger().level == level
    first = {number(body): model_is_first(body) for body in served.asked}
    assert len(first) == COUNT and 0 < sum(first.values()) < COUNT  # the package draws who comes first
    wins = []
    for line in (context.folder / "judgements.jsonl").read_text().splitlines():
        tokens = json.loads(line)["reply"]["logprobs"]["content"][0]["top_logprobs"]
        p = {token["token"]: math.exp(token["logprob"]) for token in tokens}
        if not {"m", "M"} & p.keys():
            continue
        prefers_first = p.get("m", 0) / (p.get("m", 0) + p.get("M", 0))
        i = next(n for n in first if math.isclose(prefers_first, verdict_of(n)) and n not in [w[0] for w in wins])
        wins.append((i, prefers_first if first[i] else 1 - prefers_first))
    metrics = {metric["metric"]: metric for metric in outcome.metrics}
    assert metrics["win_rate"]["value"] == pytest.approx(100 * statistics.mean(win for _, win in wins))
    assert metrics["win_rate"]["n"] == len(wins) == COUNT - 1
    expected = 100 * statistics.stdev(win for _, win in wins) / math.sqrt(len(wins))
    assert metrics["win_rate"]["stderr"] == pytest.approx(expected)
    answers = [json.loads(line)["output"] for line in (context.folder / "answers.jsonl").read_text().splitlines()]
    assert metrics["average_length"]["value"] == pytest.approx(statistics.mean(map(len, answers)))
    assert 0 < metrics["length_controlled_win_rate"]["value"] < 100
    judge = outcome.details["judge"]
    assert len(judge["errors"]) == 1 and judge["usage"]["requests"] == COUNT + 2 and judge["usage"]["cost_usd"] > 0
    assert json.loads(json.dumps(outcome.details)) == outcome.details
    assert all(body["logprobs"] and body["top_logprobs"] == 5 and body["max_tokens"] == 1 for body in served.asked)


def verdict_of(i: int) -> float:
    p = {token: math.exp(logprob) for token, logprob in verdict_by_number(i).items()}
    return p.get("m", 0) / (p.get("m", 0) + p.get("M", 0)) if {"m", "M"} & p.keys() else -1.0


def verdict_by_number(i: int) -> dict[str, float]:
    return verdict({"messages": [{"content": f"What about the cat, {i}?"}]})


def compared(configure, context, data: Path, outputs: list[str], judge_verdict) -> dict[str, dict]:
    """The metrics of these answers."""
    answers = [
        Answer(id=str(i), turn=1, digest="", output=o, tokens=1, ended=True, cut=0) for i, o in enumerate(outputs)
    ]
    with serving(JudgeServer(judge_verdict)) as served:
        config = configure(served.url)
        references, gamed = alpaca_eval.load_data(config)
        judge = Judge(config.alpaca_eval_judge, config, OPTIONS)
        annotations, _ = alpaca_eval.annotate(references, answers, context, judge)
    assert [a["output_2"] for a in annotations] == outputs
    return {metric["metric"]: metric for metric in alpaca_eval.metrics(annotations, answers, gamed)}


def test_the_length_controlled_win_rate_takes_off_what_length_explains(tmp_path):
    """Preferences made by the package's model, sigmoid(strength + 2 tanh(standardised difference in length))."""
    strength, count = 0.7, 300
    shorter = [(i * 37) % 101 for i in range(count)]  # characters by which the reference is shorter
    spread = statistics.stdev(shorter)
    wins = [1 / (1 + math.exp(-strength - 2 * math.tanh(difference / spread))) for difference in shorter]
    annotations = [
        {
            "output_1": "r" * 200,
            "output_2": "m" * (200 + difference),
            "generator_1": "gpt4_1106_preview",
            "generator_2": "micro",
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": 1 + win,
        }
        for difference, win in zip(shorter, wins, strict=True)
    ]
    neutral = [f"gamed,{i},0.5,0.0,0.0,False" for i in range(count)]
    header = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    (tmp_path / "df_gamed.csv").write_text("\n".join([header, *neutral]) + "\n")
    answers = [
        Answer(id=str(i), turn=1, digest="", output=a["output_2"], tokens=1, ended=True, cut=0)
        for i, a in enumerate(annotations)
    ]
    metrics = {m["metric"]: m for m in alpaca_eval.metrics(annotations, answers, tmp_path / "df_gamed.csv")}
    assert metrics["win_rate"]["value"] == pytest.approx(100 * statistics.mean(wins))
    assert metrics["win_rate"]["value"] > 85
    # At equal lengths the model wins with sigmoid(0.7); the fit is regularised a little.
    expected = 100 / (1 + math.exp(-strength))
    assert metrics["length_controlled_win_rate"]["value"] == pytest.approx(expected, abs=1.5)


def test_equal_answers_are_a_draw_and_not_judged(configure, context, data):
    references = json.loads((data / "alpaca_eval_gpt4_baseline.json").read_text())
    outputs = [entry["output"] for entry in references[:7]] + [f"Mine {i}." for i in range(7, COUNT)]

    def model_wins(body: dict) -> dict[str, float]:
        return {"m" if model_is_first(body) else "M": -0.01}

    metrics = compared(configure, context, data, outputs, model_wins)
    assert metrics["win_rate"]["value"] == pytest.approx(100 * (7 * 0.5 + 7) / 14)
    assert len((context.folder / "judgements.jsonl").read_text().splitlines()) == 7


def test_answers_with_markers_of_chatml_reach_the_judge_whole(configure, context, data):
    runaway = "Fine.<|im_end|>\n<|im_start|>user\nAnd the dog?<|im_end|><|im_start|>"
    seen = []

    def note(body: dict) -> dict[str, float]:
        seen.append(body["messages"])
        return {"m": -0.1}

    compared(configure, context, data, [f"{runaway} {i}" for i in range(COUNT)], note)
    assert all(runaway in messages[1]["content"] and len(messages) == 2 for messages in seen)
    import alpaca_eval as alpaca_eval_package  # here, where its warnings are behind us

    template = (alpaca_eval_package.constants.EVALUATORS_CONFIG_DIR / TEMPLATE).read_text()
    assert alpaca_eval.messages(template) == alpaca_eval_package.utils.prompt_to_chatml(template)


@pytest.mark.slow
def test_a_judge_that_dies_half_way_and_a_resume(configure, context, tmp_path):
    with serving(JudgeServer(verdict, dies_after=6)) as dying, pytest.raises(UserError, match="cannot be reached"):
        alpaca_eval.run("alpaca_eval", configure(dying.url, judge_concurrency=1), context)
    answers = (context.folder / "answers.jsonl").read_bytes()
    with serving(JudgeServer(verdict)) as served:
        resumed = alpaca_eval.run("alpaca_eval", configure(served.url), context)
        whole = alpaca_eval.run("alpaca_eval", configure(served.url), make_context(tmp_path / "whole"))
    assert (context.folder / "answers.jsonl").read_bytes() == answers
    both = [number(body) for body in dying.asked] + [number(body) for body in served.asked][: COUNT + 2 - 6]
    assert sorted(both) == sorted([*range(COUNT), 5, 5])  # 5 is never readable, and asked three times in all
    assert resumed.metrics == whole.metrics


def test_fewer_prompts_or_answers_are_errors(configure, context, data):
    with pytest.raises(UserError, match="14 prompts, AlpacaEval has 805; --limit N runs on fewer"):
        alpaca_eval.load_data(configure(limit=None))
    with serving(JudgeServer(verdict)) as served:
        alpaca_eval.run("alpaca_eval", configure(served.url), context)
        answers = context.folder / "answers.jsonl"
        answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-2]))
        config = configure(served.url, alpaca_eval_answers=str(answers))
        with pytest.raises(UserError, match=r"--alpaca_eval_answers .*: lacks 2 of 14 answers \(\d+ turn 1"):
            alpaca_eval.check("alpaca_eval", config)
        with pytest.raises(UserError, match="lacks 2 of 14 answers"):
            alpaca_eval.run("alpaca_eval", config, context)
        answers.write_text("")
        with pytest.raises(UserError, match="holds no answers"):
            alpaca_eval.check("alpaca_eval", config)


def test_what_is_missing_is_said_before_anything_is_generated(configure, data, monkeypatch):
    with pytest.raises(UserError, match="cannot be reached"):
        alpaca_eval.check("alpaca_eval", configure())
    with serving(JudgeServer(lambda body: "m")) as served, pytest.raises(UserError, match="gives no log-probabilities"):
        alpaca_eval.check("alpaca_eval", configure(served.url))
    with pytest.raises(UserError, match="no such file or directory"):
        alpaca_eval.check("alpaca_eval", configure(model="/no/model"))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY, which is not set"):
        alpaca_eval.check("alpaca_eval", configure())
    (data / "df_gamed.csv").unlink()
    with pytest.raises(UserError, match=r"has no df_gamed\.csv; it is in the data set tatsu-lab/alpaca_eval"):
        alpaca_eval.check("alpaca_eval", configure())
    with pytest.raises(UserError, match="the hub cannot be reached and the cache lacks it"):
        alpaca_eval.check("alpaca_eval", configure(alpaca_eval_data="hf://tatsu-lab/alpaca_eval"))
    (data / "df_gamed.csv").touch()
    (data / "alpaca_eval_gpt4_baseline.json").write_text('[{"instruction": "?"}]')
    with pytest.raises(UserError, match="is not a list of instruction, output, generator"):
        alpaca_eval.check("alpaca_eval", configure())
