"""SPIN (arXiv 2401.01335), the iterative baseline: generate every rejected response, then train, four times.

stage.py        from arguments to output, as every training stage goes
schedule.py     windows, learning rates and betas of the iterations, and their trainer settings
inputs.py       what a run works with: models, rows, settings, places
iterations.py   the loop: generate, train, save
generation.py   rejected responses of a whole data set, in a file that an interrupted run goes on with
samplers.py     the engine that writes them
files.py        what a run leaves on disk, and whether a directory is of this run
snapshots.py    what a bucket keeps of it meanwhile
pair_log.py     some pairs of each iteration as text
results.py      the final model, and one training log over all iterations
"""
