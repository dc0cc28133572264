"""data: any source of conversations -> checked rows for training and held-out rows."""
