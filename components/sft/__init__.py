"""sft: supervised fine-tuning on the responses, with TRL's SFTTrainer."""
