"""Publishing on the Hugging Face Hub: export a checkpoint as a folder, with a model card, and push it."""
