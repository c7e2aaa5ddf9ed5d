"""The web process: takes orders, answers from the database, never loads torch."""
