"""The database's history; nothing creates a table anywhere else."""
