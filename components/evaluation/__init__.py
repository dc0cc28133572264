"""evaluation: benchmarks of a model, each a module of its own, behind one stage."""
