"""The benchmarks there are.

A new one is a module with `check` and `run`, and an entry here. A task of lm-eval needs no module: its entry names
`lm_eval.benchmark`, and `lm_eval.tasks.TASKS` says which task. One that a judge grades stands in `judged_config.JUDGED`, beside
its settings. The choices and the help of `--benchmarks` follow.
"""

from components.evaluation.benchmark import Benchmark
from components.evaluation.judged_config import JUDGED


def _lm_eval(about: str, leaderboard_metric: str | None = None) -> Benchmark:
    """A task of `lm_eval.tasks.TASKS`."""
    return Benchmark(
        module="components.evaluation.lm_eval.benchmark",
        about=about,
        leaderboard_metric=leaderboard_metric,
    )


BENCHMARKS: dict[str, Benchmark] = {
    "held_out": Benchmark(
        module="components.evaluation.held_out.benchmark",
        about="the true next reply among four, and the perplexity of the true replies; offline",
        needs_hub=False,
        bare_metrics=True,
    ),
    "arc_challenge": _lm_eval("grade-school science, 4 choices", "acc_norm"),
    "hellaswag": _lm_eval("the likeliest ending, 4 choices", "acc_norm"),
    "mmlu": _lm_eval("57 subjects, 4 choices", "acc"),
    "truthfulqa_mc2": _lm_eval("probability of the true answers", "acc"),
    "winogrande": _lm_eval("what a pronoun refers to, 2 choices", "acc"),
    "gsm8k": _lm_eval("grade-school mathematics, the number after ####; flexible: the last number", "exact_match"),
    "ifeval": _lm_eval("instructions that a program checks"),
    **JUDGED,
}

# The Open LLM Leaderboard (v1): its benchmarks, and the metric of each that its average is of.
HEADLINES = {name: entry.leaderboard_metric for name, entry in BENCHMARKS.items() if entry.leaderboard_metric}

# Names that stand for several benchmarks.
GROUPS: dict[str, tuple[str, ...]] = {"leaderboard": tuple(HEADLINES)}


def help_lines() -> str:
    """Every benchmark and group, one a line."""
    groups = {
        name: f"Open LLM Leaderboard v1 through lm-eval: {', '.join(members)}" for name, members in GROUPS.items()
    }
    listed = {name: entry.about for name, entry in BENCHMARKS.items()} | groups
    width = max(map(len, listed)) + 2
    return "\n".join(f"{name:<{width}}{about}" for name, about in listed.items())
