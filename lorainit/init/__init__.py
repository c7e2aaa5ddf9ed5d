"""The initializations: `methods` has one paper per file, `evidence` gathers what a method looks at.

`initialize` adapts a model, `stage` does so within a run and keeps what it found out, `report` puts a start in numbers.
Knows nothing of training.
"""
