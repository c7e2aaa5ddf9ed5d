"""The life of a job, from the order (`submit`) to what it leaves behind (`results`).

A status changes in `transitions` and nowhere else; `jobs` and `pauses` give the changes their names.
"""
