"""From files to batches: rows (preferences), stages (splits), token ids (encoding), batches (loaders)."""
