"""model: any source -> one Hugging Face directory with chat template, special tokens and stop tokens in place."""
