"""Prefect servers: temporary ones for a single run, permanent ones for `sftok serve`.

`temporary.prefect_server` points Prefect at a server, `process` is a server's own process. `environment` and `database`
keep what they find on a user's machine from ending in a traceback.
"""
