"""Orchestration: recipes, tasks, flows, reports and the command line. The only room that imports Prefect."""
