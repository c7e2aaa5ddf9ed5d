"""The web process: accepts jobs, answers from the database, and never loads torch."""
