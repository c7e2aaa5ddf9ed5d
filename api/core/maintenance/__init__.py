"""What keeps the service in order: the checks of a start, `lorainit doctor`, and what may be deleted when."""
