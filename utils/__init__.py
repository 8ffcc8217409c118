"""Text, ranks and files: everything that knows nothing of models."""
