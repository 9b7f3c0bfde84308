"""Analyses: one question each. Every file has a Config, a `run(config)` and a two-line main."""
