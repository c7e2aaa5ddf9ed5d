"""The routes, a file for each kind of object. A route parses, calls one core function, commits and returns."""
