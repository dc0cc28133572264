"""The judge over HTTP: what is asked, asked again, paid for and saved, and what a broken endpoint looks like to the user."""

import itertools
import json
import time
from pathlib import Path

import pytest
from judge_server import KEY, JudgeServer, Verdict, serving

from components.common.core.errors import UserError
from components.evaluation.judged.journal import read_entries
from components.evaluation.judged.judge import Grading, Judge, Judgement
from components.evaluation.judged.mt_bench import OPTIONS, rating
from components.evaluation.judged_config import JudgedConfig

GRADINGS = [Grading(f"q{i}", 1, [{"role": "user", "content": f"Please grade answer {i}"}]) for i in range(10)]


def number(body: dict) -> int:
    return int(body["messages"][0]["content"].split()[-1])


def make_judge(url: str, model: str = "gpt-4", **changed) -> Judge:
    settings = {"judge_retries": 1, "judge_concurrency": 3, "judge_timeout": 10.0} | changed
    return Judge(model, JudgedConfig(judge_base_url=url, **settings), OPTIONS)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def ask(tmp_path: Path):
    """Judgements of GRADINGS by a server with this verdict; in the same file each time."""

    def run(verdict: Verdict, gradings=GRADINGS, server: dict | None = None, **changed):
        with serving(JudgeServer(verdict, **(server or {}))) as served:
            judge = make_judge(served.url, **changed)
            judgements: list[Judgement] = judge.ask(gradings, rating, tmp_path / "judgements.jsonl")
            return judgements, judge, served

    return run


def test_each_grading_is_asked_once_and_read_in_order(ask):
    judgements, judge, served = ask(lambda body: f"Rating: [[{number(body)}]]", GRADINGS[1:])
    assert [j.value for j in judgements] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert [j.id for j in judgements] == [g.id for g in GRADINGS[1:]]
    assert all(
        body["model"] == "gpt-4" and body["temperature"] == 0 and body["max_tokens"] == 2048 for body in served.asked
    )
    # Four words in, two out, nine times; 30 and 60 dollars per million.
    assert judge.usage == {
        "requests": 9,
        "input_tokens": 36,
        "output_tokens": 18,
        "cost_usd": pytest.approx((36 * 30 + 18 * 60) / 1e6),
    }
    facts = judge.facts(judgements)
    assert facts["served_models"] == ["gpt-4-0613"] and facts["errors"] == []
    assert KEY not in json.dumps(facts)


def test_nothing_is_asked_twice(ask):
    first, _, _ = ask(lambda body: "[[7]]", GRADINGS[:6])
    second, resumed, served = ask(lambda body: "[[2]]")
    assert [j.value for j in second] == [7.0] * 6 + [2.0] * 4
    assert sorted(map(number, served.asked)) == [6, 7, 8, 9]
    assert second[:6] == first
    assert resumed.usage["requests"] == 10  # the earlier ones are counted, not paid again
    _, _, served = ask(lambda body: "[[3]]", [Grading("q0", 1, [{"role": "user", "content": "another answer 0"}])])
    assert len(served.asked) == 1


@pytest.mark.slow
def test_rate_limits_and_server_errors_are_waited_for(ask):
    counter = itertools.count()

    def verdict(body):
        count = next(counter)
        return {0: (429, {"Retry-After": "1"}), 1: (503, {})}.get(count, "[[5]]")

    started = time.monotonic()
    judgements, _, served = ask(verdict, GRADINGS[:2], judge_retries=3, judge_concurrency=1)
    assert time.monotonic() - started > 1  # the client's own first pause is half a second at most
    assert [j.value for j in judgements] == [5.0, 5.0]
    assert len(served.seen) == 4 and len(served.asked) == 2


def test_a_judgement_that_cannot_be_read_is_asked_again_and_then_counted(ask, tmp_path, caplog):
    counters = {i: itertools.count() for i in range(10)}

    def verdict(body):
        tries = next(counters[number(body)])
        if number(body) == 4:
            return "I would rather not say."
        return "Rating: eleven [[11]]" if number(body) == 2 and tries < 2 else "[[6]]"

    judgements, judge, served = ask(verdict)
    assert [j.value for j in judgements] == [6.0] * 4 + [None] + [6.0] * 5
    assert judgements[4].error == "no rating from 1 to 10 in 'I would rather not say.'"
    assert len(served.asked) == 10 + 2 + 2
    assert judge.usage["requests"] == 14  # all of them were paid
    assert judge.facts(judgements)["errors"] == [{"id": "q4", "turn": 1, "error": judgements[4].error}]
    assert "1 of 10 judgements are errors" in caplog.text
    again, _, served = ask(verdict)
    assert again == judgements and served.seen == []
    with pytest.raises(UserError, match="no judgement of gpt-4 could be read; the first one: no rating"):
        judge.facts([judgements[4]])


def test_a_refused_request_is_an_error_of_its_judgement(ask):
    judgements, _, served = ask(lambda body: (400, {}) if number(body) == 3 else "[[6]]")
    assert judgements[3].value is None and "turned away" in judgements[3].error
    assert sum(j.value == 6.0 for j in judgements) == 9
    assert len(served.seen) == 10


def test_a_judge_that_dies_half_way_and_a_resume(ask, tmp_path):
    with pytest.raises(
        UserError, match=r"the judge gpt-4 at http://127.* cannot be reached.* are kept in .*judgements"
    ):
        ask(lambda body: f"[[{number(body) + 1}]]", server={"dies_after": 5})
    saved = read_entries(tmp_path / "judgements.jsonl")
    assert len(saved) == 5  # every reply that came is there
    with (tmp_path / "judgements.jsonl").open("a") as file:
        file.write('{"digest": "half a li')  # and the process was killed as it wrote another
    judgements, _, served = ask(lambda body: f"[[{number(body) + 1}]]")
    assert [j.value for j in judgements] == [float(i) for i in range(1, 11)]
    assert sorted([f"q{number(body)}" for body in served.asked] + [entry["id"] for entry in saved]) == sorted(
        g.id for g in GRADINGS
    )


def test_check_passes_where_the_judge_works():
    with serving(JudgeServer(lambda body: "m")) as served:
        assert make_judge(served.url).check()["message"]["content"] == "m"
    assert served.seen[0]["max_tokens"] == 1


def test_a_missing_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="needs a key in the environment variable OPENAI_API_KEY, which is not set"):
        make_judge("http://127.0.0.1:1/v1")
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with pytest.raises(UserError, match="which is not set"):
        make_judge("http://127.0.0.1:1/v1")
    with serving(JudgeServer(lambda body: "m", key=None)) as served:
        make_judge(served.url, judge_key_variable=None).check()


def test_a_wrong_key_is_not_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-key")
    with serving(JudgeServer(lambda body: "m")) as served, pytest.raises(UserError) as raised:
        make_judge(served.url).check()
    assert "refuses the key in OPENAI_API_KEY (HTTP 401)" in str(raised.value)
    assert "sk-wrong" not in str(raised.value)


def test_an_endpoint_that_is_not_there():
    with pytest.raises(UserError, match=r"at http://127\.0\.0\.1:1/v1/ cannot be reached; check --judge_base_url"):
        make_judge("http://127.0.0.1:1/v1", judge_retries=0).check()
    with serving(JudgeServer(lambda body: "m")) as served, pytest.raises(UserError, match=r"fails: .*404"):
        make_judge(served.url + "/elsewhere").check()
    with serving(JudgeServer(lambda body: "m")) as served, pytest.raises(UserError, match="something else than a chat"):
        make_judge(served.url.replace("/v1", "/page")).check()
    with (
        serving(JudgeServer(lambda body: (429, {}))) as served,
        pytest.raises(UserError, match=r"turns requests away \(HTTP 429"),
    ):
        make_judge(served.url, judge_retries=0).check()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Rating: [[5]]", 5.0),
        ("[[7.5]] and [[3]]", 7.5),
        ("only [8] here, then nothing", 8.0),
        ("[3] first, but [[9]]", 9.0),
        ("[[10]]", 10.0),
    ],
)
def test_ratings_as_fastchat_reads_them(text, value):
    assert rating({"message": {"content": text}}) == value


@pytest.mark.parametrize("text", ["", "8/10", "[[0]]", "[[11]]", "[[rating]]", None])
def test_no_rating(text):
    with pytest.raises(ValueError, match="no rating from 1 to 10"):
        rating({"message": {"content": text}})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("judge_concurrency", 0), ("judge_retries", -1), ("judge_timeout", 0.0), ("judge_prices", {"gpt-4": [1.0]})],
)
def test_settings_that_cannot_work(setting, value):
    with pytest.raises(ValueError, match=setting):
        JudgedConfig(**{setting: value}).check_judged()
