"""The worker: claims jobs, runs each in a child process, writes the database, and never loads torch."""
