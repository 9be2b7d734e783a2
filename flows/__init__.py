"""Orchestration: recipes, tasks, flows, reports and the command line. The only room that imports Prefect.

`stage` defines a stage; `make` finds its artifact or makes and publishes it; `outputs` guards the files of commands;
`option_texts` says what the options of runs mean.
"""
