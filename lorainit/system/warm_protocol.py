"""What is said between a worker's slot and the process beside it that forks runs (`worker.child.warm`,
`lorainit.warm`).

On a socket that keeps messages apart: READY ─► an order (a JSON object) with two files, the pipe for events and the log
─► `{"pid": …}` of the run ─► `{"returncode": …}` when it has ended ─► DONE, and the next order may come. Torch-free.
"""

READY, DONE = b"ready", b"done"
MAX_MESSAGE = 1 << 17
# A process cannot lengthen its command line, so this one starts with some to spare for that of a run.
COMMAND_LINE_PADDING = " " * 4096
