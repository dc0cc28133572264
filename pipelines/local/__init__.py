"""Runs of a package on this machine, without a cluster."""
