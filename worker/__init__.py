"""The supervisor side: claims jobs, runs one child process each, writes the database, never loads torch."""
