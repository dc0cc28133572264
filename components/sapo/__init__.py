"""SAPO, Self-Augmented Preference Optimization (arXiv 2405.20830): the heart of the project.

segments.py        y+ = A B C, where to cut, and y- = A B' C
replay_buffer.py   FIFO with draws of weight 1 / (count + 1)
reference_cache.py the reference's log-probs, once per entry and version
schedule.py        when the sampler works: before a step, or beside the one before
ema.py             the EMA of the policy and copies between models
pair_forward.py    log-probs of both responses of a pair
pair_attention.py  which tokens of packed pairs see which
lean_layers.py     layers that keep less for backward
losses.py          DPO and ORPO on log-probs
self_play.py       one sampling stage: rows in, buffer entries out
trainer.py         Algorithm 1 on top of transformers.Trainer
"""
