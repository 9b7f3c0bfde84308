"""Studies: one question each, asked of a model, answered with an interval, an n and a null. `analyses/` holds their
command lines, `study.py` what they share."""
