"""The protocol between a worker's slot and its warm process, which forks runs (`worker.child.warm`, `lorainit.warm`).

The warm process has loaded torch already, so that a run starts at once. The messages, on a socket that keeps them
apart: READY ─► an order (a JSON object) with two open files, the pipe for events and the log ─► `{"pid": …}` of the run
─► `{"returncode": …}` when it has ended ─► DONE, after which the next order may come. Loads no torch.
"""

READY, DONE = b"ready", b"done"
MAX_MESSAGE = 1 << 17
# The warm process starts with this padding, because a process cannot lengthen its command line, and the forked run
# should show its own.
COMMAND_LINE_PADDING = " " * 4096
