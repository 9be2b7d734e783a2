"""Prefect servers: temporary ones for a single run, permanent ones for `sftok serve`. Imports nothing of ours."""
