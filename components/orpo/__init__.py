"""orpo: Odds Ratio Preference Optimization, with TRL's ORPOTrainer."""
