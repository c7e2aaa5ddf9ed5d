"""Who may ask, how often, and what happens when a request is sent again."""
