"""Artifacts: manifests, shards, identity, lineage, verification and garbage collection.

`artifact` is the handle that readers hold; `manifest` plans, publishes and finds an artifact; `shards` lists its files.
"""
