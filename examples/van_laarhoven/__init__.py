"""The experiment of van Laarhoven 2017 on a grid of ours: ``python -m examples.van_laarhoven``."""
