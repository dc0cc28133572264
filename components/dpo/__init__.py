"""dpo: Direct Preference Optimization, with TRL's DPOTrainer."""
