"""What is trained with the chat templates of the families that people fine-tune, from the wheels of two trainers."""
