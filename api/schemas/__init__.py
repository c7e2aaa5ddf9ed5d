"""The JSON objects of the API: one file for each, with OpenAI's names and shapes."""
