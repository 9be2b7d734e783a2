"""Reports: HTML, Markdown and JSON pages of a run, of a benchmark and of a store's history.

`pages.write_pages` is the stage, `render.build_report` renders its data.
"""
