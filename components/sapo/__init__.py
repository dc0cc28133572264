"""SAPO, Self-Augmented Preference Optimization (arXiv 2405.20830): the heart of the project.

trainer.py         Algorithm 1 on top of transformers.Trainer: read this first

segments.py        y+ = A B C, where to cut, and y- = A B' C
replay_buffer.py   FIFO with draws of weight 1 / (count + 1)
ema.py             the EMA of the policy, Eq. 6
losses.py          preference losses on log-probs, Eq. 1 and Eq. 3

sampling.py        which rows a step takes, and B' from the engine
schedule.py        when the sampler works: before a step, or beside the one before
pairs.py           one pair, from the buffer's draw to the loss
scoring.py         log-probs of pairs by a model
reference.py       the reference's log-probs, once per entry and version
weights.py         the EMA's, the sampler's and the reference's weights
held_out.py        how far the policy has moved on held-out pairs
metrics.py         what a log entry has
pair_log.py        pairs as people read them

checkpoint.py      checkpoints of parts that save and restore themselves
resumable.py       transformers.Trainer with such checkpoints
state.py           which run a checkpoint is of
sharding.py        where the trained parameters lie: DDP, ZeRO-2, ZeRO-3, FSDP2
lora.py            an adapter on a frozen base
planning/          what a run would do and need: sizes, memory, remedies
"""
