"""What the command line does as a client: nothing here knows the service's inside."""
