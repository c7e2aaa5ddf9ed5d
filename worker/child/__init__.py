"""The child process of a run: started, read and stopped (`supervisor`), or forked from a warm one (`warm`).

Knows commands and pipes, but no database.
"""
