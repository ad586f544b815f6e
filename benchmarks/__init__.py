"""Measurements, and what they are made with. Results lie under `results/`."""
