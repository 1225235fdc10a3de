"""`kdeval report`: everything that is known of one student, as one HTML file that needs no network.

Begin with `report.py` (records become a page), then `sections.py` (one function for each part of it); the last two
parts are `provenance.py` and `reproduce.py`. `html.py` writes HTML, `plots.py` draws the pictures; `training_plot.py`
draws the one picture of the demonstration.
Doors: `make_report`, `plot_training`.
Knows records; nothing is measured but the relations of a sentence, where a cache is given.
"""
