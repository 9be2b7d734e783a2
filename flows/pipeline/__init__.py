"""The pipeline: stages, the Prefect tasks around them, and the flows that sequence them.

`graph.GRAPH` holds all stages, `full.full_pipeline` runs them, `dry_run` tells what a run would do.
"""
