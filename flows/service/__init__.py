"""The service behind `sftok serve`: deployments, schedules, concurrency, liveness and notifications.

`serve.serve` runs it, `deployments` holds the deployed flows.
"""
