"""The initializations: `methods` has one paper per file, `collectors` collect what a method needs.

`initialize` attaches adapters to a model, `stage` does so within a run and caches the results, and `report` measures
them. Nothing here depends on training.
"""
