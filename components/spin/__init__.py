"""SPIN (arXiv 2401.01335), the iterative baseline: generate every rejected response, then train, four times.

schedule.py     windows, learning rates and betas of the iterations, and their trainer settings
generation.py   rejected responses of a whole data set, in a file that an interrupted run goes on with
samplers.py     the engine that writes them
files.py        what a run leaves on disk, and whether a directory is of this run
clock.py        wall-clock times that outlive an interruption
iterations.py   the loop: generate, train, save
results.py      training log, sampled pairs, the final model
"""
