"""The wire: one file per object, with OpenAI's names and shapes."""
