"""Backends: run a model with an Edit at named Sites. `load_backend` chooses between them by one rule."""
