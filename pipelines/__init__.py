"""The DAGs of Kubeflow Pipelines, and the commands that compile and run them. Imports kfp, never torch."""
