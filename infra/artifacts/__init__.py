"""Artifacts: manifests, shards, identity, lineage, verification and garbage collection.

`manifest` plans, publishes and finds an artifact; `shards` lists its files.
"""
