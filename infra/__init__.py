"""Infrastructure: artifacts, stores, workers and training loops. Imports none of the other top-level packages."""
