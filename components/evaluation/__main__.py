"""evaluation: scores a model with lm-eval on the held-out split.

Chooses the true next reply among four (accuracy), and measures the perplexity of the true replies per token and per
byte. Runs offline on a Hugging Face directory.

    python -m components.evaluation --data runs/data --model runs/sft --output runs/evaluation-sft
"""

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.cli import ConfigParser, check_output, prepare_output, run_stage
from components.common.conversations import read_rows
from components.common.kfp_outputs import publish
from components.evaluation.config import EvaluationConfig

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    parser = ConfigParser("evaluation", [EvaluationConfig])
    if {"-h", "--help"} & set(argv):
        print(parser.help(__doc__ or ""))
        return
    (config,) = parser.parse(argv)
    started = time.monotonic()
    check_output(config.output, config.overwrite)
    rows, train = read_rows(config.data, "test"), read_rows(config.data, "train")

    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the libraries are imported
    import torch

    from components.common.models import load_model, load_tokenizer
    from components.evaluation import harness
    from components.evaluation.baselines import baselines
    from components.evaluation.held_out import CHOICES
    from components.evaluation.results import flat_metrics, metrics, samples, table, versions, write

    tokenizer, max_length = load_tokenizer(config.model), harness.window(config)
    device, dtype = harness.pick_device(config)
    documents, counts = harness.make_documents(rows, tokenizer, max_length, config)
    name = config.name or Path(config.model).resolve().name
    logger.info("%s: %s; window %s tokens, %s on %s", name, counts, max_length, dtype, device)
    if config.dry_run:
        print(f"plan: score {len(documents)} rows x {CHOICES} replies with {config.model}; writes {config.output}")
        return

    output = prepare_output(config.output, config.overwrite)
    # The mask that shares a prompt among replies is a boolean one, which "sdpa" takes.
    model = load_model(config.model, dtype, attn_implementation="sdpa").eval()
    model.to(torch.device(device))
    outcome = harness.run_harness(documents, model, tokenizer, config.batch_size, max_length)
    results = {
        "schema": 1,
        "name": name,
        "results": metrics(outcome),
        "baselines": baselines(train, documents, tokenizer),
        "settings": _settings(config) | {"device": device, "dtype": dtype, "max_length": max_length},
        "counts": counts,
        "tokens": harness.token_facts(tokenizer, documents),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    write(output, results, samples(outcome))
    print(table(results))
    publish(config.executor_input, {"metrics": flat_metrics(results), "results": {"name": name}})


def _settings(config: EvaluationConfig) -> dict[str, Any]:
    hidden = ("overwrite", "dry_run", "executor_input")
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in hidden}


if __name__ == "__main__":
    run_stage(main)
