"""Ablation grids as SLURM arrays."""
