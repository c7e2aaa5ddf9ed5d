"""`lora.init: "auto"`: the initialization, and the learning rate, are chosen for a job by what its own rows show.

Such a job stays `validating_files` until they are chosen (`consider`). What is tried is an experiment that anybody can
look at, and the job goes on from the best run's checkpoint (`follow`). It may know of experiments and jobs, and it is
called by the reconciler, the announcer of new jobs and `advance`.
"""
