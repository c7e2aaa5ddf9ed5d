"""LoRA fine-tuning with the initialization as a first-class choice; knows nothing of the service."""
