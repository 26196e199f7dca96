"""A run's report: pictures drawn once as SVG and PNG, and a self-contained HTML page from templates.

In: a run folder as `results.run_folder` reads it and the results of `results.analysis`. Out: ``report.html`` and PNG files in
the run folder. The templates and drawing also serve the page of a comparison.
"""
