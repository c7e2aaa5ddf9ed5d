"""One file per noun: parse, call one core function, commit, return."""
